"""cropi-select: the prompts to train on."""

from __future__ import annotations

from cropi_tools.cli.entry import entry
from cropi_tools.selection.options import SelectOptions

EXAMPLE = """
cropi-select scores.jsonl --prompts train.jsonl --ratio 0.1 -o selected.jsonl
cropi-select --prompts train.jsonl --by random -n 150 --seed 3 -o random.jsonl
cropi-select --prompts train.jsonl --by learnability --rollouts train.rollouts.jsonl -o learnable.jsonl
cropi-select predicted.jsonl --prompts train.jsonl --among predicted --ratio 0.2 -o shortlist.jsonl
cropi-select scores.jsonl --prompts train.jsonl --format verl -o selected.parquet
"""


def select(options: SelectOptions) -> None:
    """The top share of the pool, merged over validation sets by reciprocal rank, or one of the baselines.

    Prompts without a score (no advantage) are never selected by influence; when fewer have one than asked for, fewer are selected.
    """
    from cropi_tools import runtime
    from cropi_tools.data.jsonl_output import JsonLinesOutput
    from cropi_tools.data.manifest import Fingerprint, numbered
    from cropi_tools.data.records import pass_rate, read_prompts, read_rollouts, read_scores
    from cropi_tools.prompts.exports import TableOutput, exported, settings_needed
    from cropi_tools.runtime.errors import InputError
    from cropi_tools.selection import rules

    inputs = {
        **numbered("prompts", options.prompts),
        **numbered("scores", options.scores),
        **numbered("rollouts", options.rollouts),
    }
    fingerprint = Fingerprint.of("cropi-select", options.decisive(), inputs)
    kind = TableOutput if options.as_table else JsonLinesOutput
    target = kind(options.output, fingerprint, inputs, force=options.force)
    if not target.open():
        runtime.notify(f"{options.output}: up to date")
        return
    pool = {record["id"]: record for record in read_prompts(options.prompts)}
    if options.by != "full" and options.number is None:
        rules.check_ratio(options.share, len(pool))
    known = None
    if options.scores:
        known = {
            r["id"]: rules.Score(
                r["id"], r["source"], r["scores"], r["pass_rate"], r["status"], r.get("measured", True)
            )
            for r in read_scores(options.scores)
        }
    elif options.rollouts:
        known = {
            r.id: rules.Score(r.id, r.source, None, pass_rate(r.rewards), "sampled")
            for r in read_rollouts(options.rollouts)
        }
    sources = {identity: record["source"] for identity, record in pool.items()} if options.per_source else None
    chosen = rules.select(
        options.by, list(pool), known, options.share, options.seed, options.band, options.number, options.among, sources
    )
    wanted = options.number or rules.selection_size("1" if options.by == "full" else options.share, len(pool))
    rates = {identity: score.pass_rate for identity, score in (known or {}).items()}
    if options.among != "measured" and known and not any(not score.measured for score in known.values()):
        raise InputError(
            f"--among {options.among}: {', '.join(options.scores)} has measured scores alone; cropi-score --predict makes predicted ones"
        )
    selected = [
        {
            **pool[item.id],
            "rank": item.rank,
            "score": item.score,
            **({"reciprocal_rank": item.reciprocal_rank} if options.by_influence else {}),
            "pass_rate": rates.get(item.id),
        }
        for item in chosen
    ]
    needed = settings_needed(selected, options.format)
    target.append(exported(selected, options.format))
    if needed is not None:
        runtime.warn(needed)
    if len(chosen) < wanted:
        asked = f"--ratio {options.share}" if options.number is None else f"-n {options.number}"
        runtime.warn(
            f"{asked} asks for {wanted} prompts, and only {len(chosen)} can be selected by {options.by}, all there are: "
            f"{_lacking(options)}"
        )
    target.finish(facts={"pool": len(pool), "wanted": wanted})
    runtime.notify(f"{options.output}: {len(chosen)} of {len(pool)} prompts selected by {options.by}")


def _lacking(options: SelectOptions) -> str:
    """Why a rule cannot select the others, and what helps."""
    by = options.by
    if options.among == "predicted":
        return "the others were measured, or none has a predicted score; ask for fewer"
    if by == "pass-rate":
        return "the pass rates of the others are unknown or outside --band; widen it, or ask for fewer"
    if by in ("learnability", "hardest"):
        return "the pass rates of the others are unknown; sample them, or ask for fewer"
    return "the others have no score, since all their responses earned the same; take more samples (cropi-rollout -n), or ask for fewer"


main = entry(SelectOptions, select, name="cropi-select", example=EXAMPLE)
