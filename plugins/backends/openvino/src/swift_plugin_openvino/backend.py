"""Runs in OpenVINO's environment behind worker_http.py: a pipeline for the model and one for each adapter, fused into its
weights. One thread steps those that have requests; the requests of each share its steps."""

import itertools
import json
import pathlib
import queue
import re
import threading

import numpy
import openvino
import openvino_genai as genai

PRECISION = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}


def open_backend(options):
    return Backend(options)


class Job:
    def __init__(self, pipe, number, ids, config, stream, put):
        self.pipe, self.number, self.ids, self.config, self.put = pipe, number, ids, config, put
        self.stream = stream  # else it is read when it is over: reading takes a moment of each step
        self.handle = None
        self.choices = {}  # of a sequence's number, which choice it is
        self.ended = set()


class Backend:
    def __init__(self, options):
        self.options, self.path = options, pathlib.Path(options["folder"])
        precision = PRECISION[options["precision"]]
        cache = precision if options["cache_precision"] == "auto" else options["cache_precision"]
        self.properties = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": cache}
        if options["threads"]:
            self.properties["INFERENCE_NUM_THREADS"] = options["threads"]
        self.adapters = {}  # by the name that requests give
        self.pipes = {"base": self.pipeline()}
        self.scoring, self.whole, self.scorers = threading.Lock(), None, {}
        self.inbox = queue.SimpleQueue()
        self.numbers = itertools.count()
        threading.Thread(target=self.run, daemon=True).start()

    def pipeline(self, adapter=None, prefixes=True):
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = self.options["cache_gb"]
        scheduler.max_num_seqs = self.options["max_rows"]
        scheduler.enable_prefix_caching = prefixes
        scheduler.dynamic_split_fuse = True
        properties = dict(self.properties)
        if adapter:
            properties["adapters"] = genai.AdapterConfig([adapter], genai.AdapterConfig.Mode.MODE_FUSE)
        return genai.ContinuousBatchingPipeline(self.path, scheduler, "CPU", properties)

    def submit(self, sent, put):
        ids = openvino.Tensor(numpy.array([sent["prompt"]], dtype=numpy.int64))
        config = config_of(sent)
        config.logprobs = int(self.options["logprobs"])
        job = Job(self.pipes[sent["model"]], next(self.numbers), ids, config, sent["stream"], put)
        self.inbox.put(("add", job))
        return lambda: self.inbox.put(("cancel", job))

    def scores(self, ids, model, top):
        """Of each id but the first. Of an adapter's model they are read from an echoed prompt: that tells no others."""
        if model == "base":
            return self.base_scores(ids, top)
        if top:
            raise ValueError("what is likeliest in a prompt's places is told of the model without an adapter only")
        config = genai.GenerationConfig()
        config.max_new_tokens, config.echo, config.logprobs = 0, True, 1
        with self.scoring:
            if model not in self.scorers:  # states of earlier prompts have no scores
                self.scorers[model] = self.pipeline(self.adapters[model], prefixes=False)
            pipe, row = self.scorers[model], openvino.Tensor(numpy.array([ids], dtype=numpy.int64))
            handle, values = pipe.add_request(next(self.numbers), row, config), []
            while handle.get_status() == genai.GenerationStatus.RUNNING:
                pipe.step()
            while handle.can_read():
                for output in handle.read().values():
                    values += output.generated_log_probs
        if len(values) != len(ids):
            raise RuntimeError(f"the pipeline told {len(values)} log-probabilities of {len(ids)} tokens")
        return [(float(value), []) for value in values[1:]]

    def base_scores(self, ids, top):
        """From the model as it was exported."""
        with self.scoring:
            if self.whole is None:
                core = openvino.Core()
                self.whole = core.compile_model(self.path / "openvino_model.xml", "CPU", self.properties).create_infer_request()
            self.whole.reset_state()
            row = numpy.array([ids], dtype=numpy.int64)
            given = {
                "input_ids": row, "attention_mask": numpy.ones_like(row), "position_ids": numpy.arange(len(ids))[None],
                "beam_idx": numpy.zeros(1, dtype=numpy.int32),
            }  # fmt: skip
            known = {name for port in self.whole.model_inputs for name in port.names}
            self.whole.infer({name: value for name, value in given.items() if name in known})
            logits = self.whole.get_tensor("logits").data[0, :-1].astype(numpy.float64)
        logits -= logits.max(-1, keepdims=True)
        logits -= numpy.log(numpy.exp(logits).sum(-1, keepdims=True))
        values = numpy.take_along_axis(logits, row[0, 1:, None], -1)[:, 0].tolist()
        order = numpy.argsort(-logits, -1, kind="stable")[:, :top] if top else numpy.zeros((len(logits), 0), int)
        told = numpy.take_along_axis(logits, order, -1)
        return [
            (value, list(zip(ids_, of, strict=True)))
            for value, ids_, of in zip(values, order.tolist(), told.tolist(), strict=True)
        ]

    def load_adapter(self, name, folder):
        """The weights of `folder`, fused into those of a pipeline of its own."""
        config = json.loads(pathlib.Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
        adapter = genai.Adapter(pathlib.Path(folder, "adapter_model.safetensors")), scale
        self.pipes[name] = self.pipeline(adapter)
        self.adapters[name] = adapter

    def unload_adapter(self, name):
        del self.pipes[name], self.adapters[name]
        with self.scoring:
            self.scorers.pop(name, None)

    def run(self):
        active = {}
        while True:
            while not active or not self.inbox.empty():
                what, job = self.inbox.get()
                if what == "add":
                    try:
                        job.handle = job.pipe.add_request(job.number, job.ids, job.config)
                        active[job.number] = job
                    except Exception as err:
                        job.put(ValueError(" ".join(str(err).split())[-300:]))
                elif job.number in active:
                    active.pop(job.number).handle.cancel()
            for pipe in {id(job.pipe): job.pipe for job in active.values()}.values():
                try:
                    if pipe.has_non_finished_requests():
                        pipe.step()
                except Exception as err:
                    for job in [job for job in active.values() if job.pipe is pipe]:
                        job.put(RuntimeError(" ".join(str(err).split())[-300:]))
                        job.handle.cancel()
                        del active[job.number]
            for number, job in list(active.items()):
                if self.read(job):
                    del active[number]

    def read(self, job):
        """Pass on what is new; True where the job is over."""
        status = job.handle.get_status()  # before reading: what comes with the end is read too
        if status == genai.GenerationStatus.RUNNING and not job.stream:
            return False
        while job.handle.can_read():
            for sequence, output in job.handle.read().items():
                choice = job.choices.setdefault(sequence, len(job.choices))
                finish = {"STOP": "stop", "LENGTH": "length"}.get(output.finish_reason.name)
                ids = list(output.generated_ids)
                values = list(output.generated_log_probs) if job.config.logprobs else []
                job.put({"choice": choice, "ids": ids, "logprobs": values, "finish": finish})
        if status == genai.GenerationStatus.RUNNING:
            return False
        if status == genai.GenerationStatus.IGNORED:
            job.put(ValueError("the prompt does not fit into the cache; engine.cache_gb makes it larger"))
        else:
            job.put(None)
        return True


def config_of(sent):
    config = genai.GenerationConfig()
    config.max_new_tokens, config.min_new_tokens = sent["max_tokens"], sent["min_tokens"]
    config.ignore_eos = sent["ignore_eos"] and not sent["stop_token_ids"]
    config.stop_token_ids = set(sent["stop_token_ids"])
    config.repetition_penalty = sent["repetition_penalty"]
    config.presence_penalty, config.frequency_penalty = sent["presence_penalty"], sent["frequency_penalty"]
    config.do_sample = sent["temperature"] > 0
    if config.do_sample:
        config.temperature, config.top_p, config.min_p = sent["temperature"], sent["top_p"], sent["min_p"]
        if sent["top_k"]:
            config.top_k = sent["top_k"]
        config.num_return_sequences = sent["n"]
        if sent.get("seed") is not None:
            config.rng_seed = sent["seed"] % 2**31
    if wanted := sent.get("structured_outputs"):
        ((kind, value),) = wanted.items()
        structured = genai.StructuredOutputConfig()
        if kind in ("json", "json_object"):
            structured.json_schema = json.dumps(value) if kind == "json" else '{"type": "object"}'
        else:
            structured.regex = value if kind == "regex" else "|".join(f"({re.escape(text)})" for text in value)
        config.structured_output_config = structured
    return config
