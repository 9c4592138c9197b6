"""transformers in the place of vLLM, for verl on a CPU; imported by every process that opens the model (`model.external_lib`).

What it is asked and what it samples is written, one line a response, to the file that CPU_ROLLOUTS names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

import ray
import torch
from verl.workers.rollout import base, replica
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

SERVER = "cpu_server"


class Server:
    """An actor with a copy of the weights; `version` is the training step that they are of."""

    def __init__(self, path: str, limit: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.limit = limit
        self.version: int | None = None

    async def generate(self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any) -> Any:
        tokens, logprobs = self._sampled(prompt_ids, sampling_params["temperature"])
        told = {"version": self.version, "prompt": list(prompt_ids), "tokens": tokens, "logprobs": logprobs}
        with open(os.environ["CPU_ROLLOUTS"], "a") as stream:
            stream.write(json.dumps({**told, "parameters": dict(sampling_params)}) + "\n")
        steps = {"global_steps": self.version}
        return TokenOutput(token_ids=tokens, log_probs=logprobs, stop_reason="completed", extra_fields=steps)

    @torch.inference_mode()
    def _sampled(self, prompt: list[int], temperature: float) -> tuple[list[int], list[float]]:
        end = self.model.generation_config.eos_token_id
        tokens: list[int] = []
        logprobs: list[float] = []
        ids, cache = torch.tensor([prompt]), None
        while len(tokens) < self.limit and end not in tokens:
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            table = torch.log_softmax(out.logits[0, -1].float() / (temperature or 1.0), -1)
            token = int(torch.multinomial(table.exp(), 1) if temperature else table.argmax())
            tokens.append(token)
            logprobs.append(float(table[token]))
            ids = torch.tensor([[token]])
        return tokens, logprobs

    async def load(self, weights: dict[str, torch.Tensor], version: int | None) -> None:
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        assert not unexpected, unexpected
        assert set(missing) <= {"lm_head.weight"}, missing
        self.version = version

    async def sleep(self, *_: Any, **__: Any) -> None:
        pass

    wake_up = clear_kv_cache = sleep


class Adapter(BaseRollout):
    """The trainer's side: hands its weights over."""

    async def resume(self, tags: list[str]) -> None:
        pass

    async def release(self) -> None:
        pass

    async def update_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None, **_: Any
    ) -> None:
        found = {name: tensor.detach().float().clone() for name, tensor in weights}
        if torch.distributed.get_rank() == 0:
            await ray.get_actor(SERVER).load.remote(found, global_steps)


class Replica(RolloutReplica):
    """The sampler's side: one server."""

    async def launch_servers(self) -> None:
        actor = ray.remote(Server).options(name=SERVER, num_cpus=0, max_concurrency=64)
        server = actor.remote(self.model_config.path, self.config.response_length)
        self.servers = [server]
        self._server_handle, self._server_address = server, "cpu"
        await server.wake_up.remote()


base._ROLLOUT_REGISTRY[("vllm", "async")] = f"{__name__}.Adapter"
replica.RolloutReplicaRegistry.register("vllm", lambda: Replica)
