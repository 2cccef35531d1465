"""Runs in llama.cpp's environment behind worker_http.py: one context, one sequence at a time, sampled here from its logits."""

import threading

import llama_cpp
import numpy


def open_backend(options):
    return Backend(options)


class Backend:
    def __init__(self, options):
        self.llama = llama_cpp.Llama(
            options["gguf"], n_ctx=options["max_length"], n_threads=options["threads"], n_threads_batch=options["threads"],
            verbose=False,
        )  # fmt: skip
        self.length, self.vocabulary = self.llama.n_ctx(), self.llama.n_vocab()
        self.turn = threading.Lock()
        self.past = []  # the ids whose keys and values the context holds

    def submit(self, sent, put):
        self.check(sent["prompt"])
        stopped = threading.Event()

        def work():
            try:
                for choice in range(sent["n"]):
                    with self.turn:
                        for event in self.answer(sent, choice):
                            if stopped.is_set():
                                return
                            put({"choice": choice, **event})
                put(None)
            except Exception as err:
                put(err)

        threading.Thread(target=work, daemon=True).start()
        return stopped.set

    def scores(self, ids, model, top):
        self.check(ids)
        with self.turn:
            self.past = []
            logits = self.forward(ids, every=True)[:-1]
        return [(float(told[i]), likeliest(told, top)) for told, i in zip(map(log_softmax, logits), ids[1:], strict=True)]

    def load_adapter(self, name, folder):
        raise ValueError("llama.cpp takes adapters in its own form only; merge it first")

    unload_adapter = load_adapter

    def check(self, ids):
        if wrong := [i for i in ids if not 0 <= i < self.vocabulary]:
            raise ValueError(f"token id {wrong[0]} is not in the file's vocabulary of {self.vocabulary}: another tokenizer's?")
        if len(ids) >= self.length:
            raise ValueError(f"the prompt has {len(ids)} tokens, and the context {self.length}: engine.max_length")

    def forward(self, ids, every=False):
        """Logits after the last id, or after each of them: [1 or len(ids), vocabulary]. Computes what the context lacks."""
        same = next((n for n, (a, b) in enumerate(zip(self.past, ids, strict=False)) if a != b), min(len(self.past), len(ids)))
        same = 0 if every else min(same, len(ids) - 1)
        context, found = self.llama._ctx, []
        context.kv_cache_seq_rm(-1, same, -1)
        self.past = list(ids[:same])
        for start in range(same, len(ids), self.llama.n_batch):
            part = ids[start : start + self.llama.n_batch]
            self.llama._batch.set_batch(batch=part, n_past=start, logits_all=every)
            context.decode(self.llama._batch)
            self.past += part
            rows = len(part) if every else 1
            shape = (rows * self.vocabulary,)
            found.append(numpy.ctypeslib.as_array(context.get_logits(), shape=shape).reshape(rows, -1).astype(numpy.float64))
        return numpy.concatenate(found) if every else found[-1]

    def answer(self, sent, choice):
        ids, new = list(sent["prompt"]), []
        seed = sent.get("seed")
        random = numpy.random.default_rng(None if seed is None else [seed % 2**63, choice])
        stops = sent["stop_token_ids"]
        while True:
            logits = self.forward(ids)[0]
            told = log_softmax(logits)
            chosen = choose(adjusted(logits, ids, new, sent, stops), sent, random)
            ids.append(chosen)
            new.append(chosen)
            finish = "stop" if chosen in stops else None
            if finish is None and (len(new) >= sent["max_tokens"] or len(ids) >= self.length):
                finish = "length"
            count = sent["logprobs"]
            top = [likeliest(told, count)] if count else []
            yield {"ids": [chosen], "logprobs": [float(told[chosen])], "top": top, "finish": finish}
            if finish:
                return


def log_softmax(logits):
    shifted = logits - logits.max()
    return shifted - numpy.log(numpy.exp(shifted).sum())


def likeliest(told, count):
    """The `count` likeliest ids with their log-probabilities, the likeliest first."""
    return [(int(i), float(told[i])) for i in numpy.argsort(-told, kind="stable")[:count]] if count else []


def adjusted(logits, ids, new, sent, stops):
    """With bias and penalties, and without what may not end the answer yet."""
    logits = logits.copy()
    for token, bias in (sent.get("logit_bias") or {}).items():
        logits[int(token)] += bias
    if sent["repetition_penalty"] != 1:
        seen = numpy.unique(ids)
        logits[seen] = numpy.where(
            logits[seen] > 0, logits[seen] / sent["repetition_penalty"], logits[seen] * sent["repetition_penalty"]
        )
    if new and (sent["presence_penalty"] or sent["frequency_penalty"]):
        made, counts = numpy.unique(new, return_counts=True)
        logits[made] -= sent["presence_penalty"] + sent["frequency_penalty"] * counts
    if len(new) < sent["min_tokens"]:
        logits[list(stops)] = -numpy.inf
    return logits


def choose(logits, sent, random):
    """The likeliest, or one drawn: temperature, top_k, top_p, min_p, in this order."""
    if sent["temperature"] <= 0:
        return int(logits.argmax())
    values = log_softmax(logits / sent["temperature"])
    order = numpy.argsort(-values, kind="stable")
    if sent["top_k"]:
        order = order[: sent["top_k"]]
    shares = numpy.exp(values[order])
    shares /= shares.sum()
    kept = numpy.cumsum(shares) - shares < sent["top_p"]
    kept[0] = True
    order, shares = order[kept], shares[kept] / shares[kept].sum()
    kept = shares >= sent["min_p"] * shares[0]
    order, shares = order[kept], shares[kept] / shares[kept].sum()
    return int(random.choice(order, p=shares))
