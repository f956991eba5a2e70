"""vLLM as the tests use it.

``python serving.py FOLDER OPTIONS`` prints what a model says, for tests that need processes of their own.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_DISABLE_COMPILE_CACHE": "1",  # it does not see that a plugin has changed
}
PROMPTS = ([5, 9, 33, 21, 7], [60, 2, 3], [11])


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
        }
        self.used = True
        self.llm = LLM(str(folder), **{**settings, **options})
        return self.llm

    def tokens(self, folder: Path, adapter: Path | None = None, **options: Any) -> list[list[int]]:
        """What a model, with an adapter, says greedily to :data:`PROMPTS`."""
        return self.say(self.load(folder, **options), adapter)

    @staticmethod
    def say(llm: LLM, adapter: Path | None = None) -> list[list[int]]:
        """What a model that is loaded says."""
        greedy = SamplingParams(max_tokens=12, temperature=0, detokenize=False)
        lora = None if adapter is None else LoRARequest("adapter", 1, str(adapter))
        prompts = [{"prompt_token_ids": p} for p in PROMPTS]
        answers = llm.generate(prompts, greedy, use_tqdm=False, lora_request=lora)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def close(self) -> None:
        """Forget the model."""
        if self.used:  # a model that was refused leaves its process groups, too
            self.llm, self.used = None, False
            gc.collect()
            cleanup_dist_env_and_memory()


def tokens_of_another_process(folder: Path, env: dict[str, str], **options: Any) -> list[list[int]]:
    """:meth:`Engine.tokens` as a server would come to them, with workers in processes of their own."""
    command = [sys.executable, __file__, str(folder), json.dumps(options)]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **env}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return answer


@contextlib.contextmanager
def server(folder: Path, *arguments: str) -> Iterator[openai.OpenAI]:
    """``vllm serve`` with a model, and a client of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The same as the command vllm, which asks for a distribution of that name and not vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--port", str(port), "--enforce-eager", *arguments]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            if not _is_healthy(process, f"http://127.0.0.1:{port}/health"):
                log.seek(0)
                raise AssertionError(f"the server did not come up: {log.read()[-3000:]}")
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
                yield client
        finally:
            process.terminate()
            process.wait(30)


def _is_healthy(process: subprocess.Popen[bytes], url: str) -> bool:
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(url, timeout=5):
            return True
        time.sleep(1)
    return False


if __name__ == "__main__":
    engine = Engine()
    print(json.dumps(engine.tokens(Path(sys.argv[1]), **json.loads(sys.argv[2]))), flush=True)
