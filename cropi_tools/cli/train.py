"""cropi-train: GRPO on the selected prompts."""

from __future__ import annotations

from cropi_tools.cli.entry import entry
from cropi_tools.runtime.clock import importing
from cropi_tools.training.options import TrainOptions

EXAMPLE = """
cropi-train --model P0 selected.jsonl --steps 50 -o P1
cropi-train --model P0 selected.jsonl --steps 50 --preset dapo --batch 128 --minibatch 128 -o P1
cropi-train --model P0 selected.jsonl --steps 50 --eval target=test.jsonl --eval-every 10 -o P1
cropi-train --model P0 selected.jsonl --steps 50 --against target=valid.mean.safetensors -o P1
torchrun --nproc-per-node 8 --no-python cropi-train --model P0 selected.jsonl --steps 50 -o P1
"""


def train(options: TrainOptions) -> None:
    """GRPO: sample responses from the policy, verify them, follow the objective's gradient, repeat.

    Writes a policy folder that transformers opens, with training.json (the resolved options), metrics.jsonl, evaluations.jsonl and
    timings.jsonl in it, with --against also influence.jsonl. Under torchrun the policy and the work are shared out over all processes.
    """
    from cropi_tools import runtime
    from cropi_tools.cli.common import warn_of_other_dates
    from cropi_tools.data.dates import asks_for_date
    from cropi_tools.data.manifest import Fingerprint
    from cropi_tools.data.output import Output
    from cropi_tools.training.distributed import Ranks, several
    from cropi_tools.training.inputs import check_available, inputs_of, verifiers_of

    if options.engine == "verl":
        from cropi_tools.verl_backend.config import refuse_what_verl_cannot

        refuse_what_verl_cannot(options)
    check_available(options, several())
    options = options.with_folders()
    inputs = inputs_of(options)
    verifiers = verifiers_of(options)
    own_verifiers = verifiers["own_verifiers"]
    dated = asks_for_date(options.model)
    if dated:
        warn_of_other_dates([options.model, *options.prompts, *options.sets.values()], options.date)
    decisive = options.decisive(verifiers, dated)
    fingerprint = Fingerprint.of("cropi-train", decisive, inputs)
    target = Output(options.output, fingerprint, inputs, folder=True, force=options.force)
    if options.engine == "verl":
        from cropi_tools.verl_backend.run import train_by_verl

        train_by_verl(options, own_verifiers, target)
        return
    if options.dry_run:
        with importing():
            from cropi_tools.training.estimate import estimate

        estimate(options, own_verifiers).tell(options.as_json)
        return
    with Ranks.of_torchrun(options.device) if several() else Ranks() as ranks:
        # one speaks; what goes wrong all may say
        runtime.set_quiet(options.quiet or not ranks.first)
        opened, target.state = ranks.first_does(lambda: (target.open(), target.state))
        if not opened:
            runtime.notify(f"{options.output}: up to date")
            return

        with importing():
            from cropi_tools.training import run

        run.train(options, own_verifiers, target, ranks)


main = entry(TrainOptions, train, name="cropi-train", example=EXAMPLE)
