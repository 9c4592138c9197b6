"""The reward of a response in verl's own processes, by our verifiers: what the reward file of a run is made of.

verl calls a reward function from many threads at once, and of a prompt whose reward failed it logs a line and trains on the rest. So several
pools are at hand, each for one thread at a time, and what a verifier cannot do is written where the command that runs verl finds it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from queue import LifoQueue
from typing import Any

from cropi_tools.data.jsonl import Record
from cropi_tools.rewards.pool import VerifierPool
from cropi_tools.rewards.verifiers import allow_files
from cropi_tools.rollouts.grading import graded
from cropi_tools.runtime.errors import CropiError

AT_ONCE = 2  # verifiers in each of verl's reward processes, of which it has eight: one hangs, the other works


class Scorer:
    """verl's `compute_score`. verifier, seconds, partial_credit: as of `VerifierPool`. failed: the file to which a failure is written.
    programs: the files that records may name as their verifiers.
    """

    def __init__(
        self,
        verifier: str | None,
        seconds: float,
        failed: str,
        partial_credit: bool = False,
        programs: Sequence[str] = (),
    ) -> None:
        self._failed = failed
        allow_files(programs)
        # last in, first out: what is warm is used again, and the second starts when there is need of it
        self._pools: LifoQueue[VerifierPool] = LifoQueue()
        for _ in range(AT_ONCE):
            self._pools.put(VerifierPool(verifier, workers=1, seconds=seconds, partial_credit=partial_credit))

    def __call__(
        self,
        data_source: str,
        solution_str: str,
        ground_truth: str,
        extra_info: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> dict[str, float]:
        """`score`, the reward, and `acc`, 1 where the verifier calls the answer correct."""
        record = _record(data_source, solution_str, ground_truth, extra_info or {})
        pool = self._pools.get()
        try:
            (sample,) = graded(pool, [record])[0]["samples"]
        except CropiError as error:
            _tell(self._failed, str(error))
            raise
        finally:
            self._pools.put(pool)
        return {"score": float(sample["reward"]), "acc": float(sample["outcome"] == "correct")}

    def close(self) -> None:
        """End the verifiers; no call may be under way."""
        while not self._pools.empty():
            self._pools.get().close()


def _record(data_source: str, text: str, answer: str, row: Mapping[str, Any]) -> Record:
    """The rollout record that the row of `verl_data` stands for."""
    record: Record = {
        "id": row.get("index"),
        "prompt": "",
        "answer": answer,
        "source": row.get("source", data_source),
        "extra": json.loads(row.get("extra") or "{}"),
        "samples": [{"text": text}],
    }
    if row.get("verifier"):
        record["verifier"] = row["verifier"]
    if row.get("reasoning_open"):
        record["reasoning_open"] = True
    return record


def _tell(path: str, reason: str) -> None:
    """Write the reason, whole or not at all."""
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(reason)
    os.replace(temporary, path)
