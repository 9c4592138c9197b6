"""Samples with vLLM in this process: a round, and with the word `endless` for ever. For tests that end it."""

import os
import sys

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the commands do

if __name__ == "__main__":
    from asking import requests

    from cropi_tools import runtime
    from cropi_tools.engines.protocol import Sampling
    from cropi_tools.engines.vllm_engine import VllmEngine
    from cropi_tools.policy.tokens import load_tokens

    runtime.install_signal_handlers()
    engine = VllmEngine(sys.argv[1], load_tokens(sys.argv[1]))
    engine.sample(requests(4), Sampling(4, 1.0))
    print("sampled", flush=True)
    while sys.argv[2:] == ["endless"]:
        for _ in engine.stream([requests(64)] * 16, Sampling(60, 1.0)):
            pass
