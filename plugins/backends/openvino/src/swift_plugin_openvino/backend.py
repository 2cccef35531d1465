"""Runs in OpenVINO's environment behind worker_http.py: one pipeline, stepped by one thread; requests share its steps."""

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
    def __init__(self, number, ids, config, put):
        self.number, self.ids, self.config, self.put = number, ids, config, put
        self.handle = None
        self.choices = {}  # of a sequence's number, which choice it is
        self.ended = set()


class Backend:
    def __init__(self, options):
        precision = PRECISION[options["precision"]]
        self.properties = properties = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}
        if options["threads"]:
            properties["INFERENCE_NUM_THREADS"] = options["threads"]
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = options["cache_gb"]
        scheduler.max_num_seqs = options["max_rows"]
        scheduler.enable_prefix_caching = True
        scheduler.dynamic_split_fuse = True
        self.pipe = genai.ContinuousBatchingPipeline(options["folder"], scheduler, "CPU", properties)
        self.path = pathlib.Path(options["folder"])
        self.scoring, self.whole = threading.Lock(), None
        self.inbox = queue.SimpleQueue()
        self.numbers = itertools.count()
        threading.Thread(target=self.run, daemon=True).start()

    def submit(self, sent, put):
        ids = sent["prompt"]
        job = Job(next(self.numbers), openvino.Tensor(numpy.array([ids], dtype=numpy.int64)), config_of(sent), put)
        self.inbox.put(("add", job))
        return lambda: self.inbox.put(("cancel", job))

    def scores(self, ids, model, top):
        """Of each id but the first, from the model as it was exported: the pipeline tells those of an answer only."""
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
        raise ValueError("this backend has no adapters")

    unload_adapter = load_adapter

    def run(self):
        active = {}
        while True:
            while not active or not self.inbox.empty():
                what, job = self.inbox.get()
                if what == "add":
                    try:
                        job.handle = self.pipe.add_request(job.number, job.ids, job.config)
                        active[job.number] = job
                    except Exception as err:
                        job.put(ValueError(" ".join(str(err).split())[-300:]))
                elif job.number in active:
                    active.pop(job.number).handle.cancel()
            try:
                if self.pipe.has_non_finished_requests():
                    self.pipe.step()
            except Exception as err:
                for job in active.values():
                    job.put(RuntimeError(" ".join(str(err).split())[-300:]))
                    job.handle.cancel()
                active.clear()
                continue
            for number, job in list(active.items()):
                if self.read(job):
                    del active[number]

    def read(self, job):
        """Pass on what is new; True where the job is over."""
        status = job.handle.get_status()  # before reading: what comes with the end is read too
        while job.handle.can_read():
            for sequence, output in job.handle.read().items():
                choice = job.choices.setdefault(sequence, len(job.choices))
                finish = {"STOP": "stop", "LENGTH": "length"}.get(output.finish_reason.name)
                ids = list(output.generated_ids)
                values = list(output.generated_log_probs)
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
    config.logprobs = 1
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
