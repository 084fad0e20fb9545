"""Plans of comparisons: methods x settings x seeds.

A plan is a YAML file, from the package or your own:

    title: Four methods on photographs
    script: examples/my_script.py           # optional: instead of hf-dbp pretrain; takes --seed and --output_dir, and
                                            # writes a run record (`hf_dbp.training.recording`)
    recipe: demo.yaml                       # optional: flags that all runs share ...
    flags: {max_steps: 600, image_size: 32} # ... and more of them
    axes:                                   # what is compared; the variants are the product of the axes
      method:
        adamw: {method: bp, optimizer: adamw}
        dbp+adamw: {method: dbp, optimizer: adamw}
    search: {learning_rate: [1e-3, 2e-3]}   # tried for every variant, with the first seed; or a separate list
                                            # for each: {learning_rate: {adamw: [...], dbp+adamw: [...]}}
    seeds: [0, 1, 2]                        # the others run at each variant's best
    against: {adamw: [dbp+adamw]}           # baseline -> variants compared with it (default: the first, all others)
    segmentation: {recipe: demo_upernet.yaml, flags: {}, random: true}  # optional: mean IoU of each seed's encoder
    classification: {flags: {train_dir: tiles}, random: true}           # optional: accuracy of each seed's encoder
    detection: {flags: {train_dir: photos, train_mask_dir: boxes.json}} # optional: mean average precision of it; with
                                                                        # instances: true, that of masks too
    probe: {flags: {train_dir: tiles}}      # optional: k nearest neighbours and a linear probe on each encoder
    lengths: {adamw: [900, 1200]}           # optional: complete schedules of other lengths (max_steps) of a baseline,
                                            # at its best setting: where does it reach another variant's result?

Seeds are paired: data order, crops and masks are functions of (seed, epoch, image), and weights start from the seed, so
runs of one seed differ only in the method. `hf_dbp.comparison.runner` runs a plan.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_dbp._moved import moved_names
from hf_dbp.comparison.heads import HEADS, Head
from hf_dbp.comparison.runs import PlannedRun, Run
from hf_dbp.data.sources import ImageSource
from hf_dbp.downstream.probe import ProbeArguments, load_labelled
from hf_dbp.errors import UserError
from hf_dbp.recipes import (
    flag_arguments,
    flag_names,
    parse_arguments,
    plan_names,
    read_yaml,
    recipe_arguments,
    recipe_path,
    typed,
)
from hf_dbp.training import arguments as pretraining

__all__ = ["Finetuning", "Plan", "Probe", "is_number", "plan_of", "read_plan"]

if not TYPE_CHECKING:
    __getattr__ = moved_names(__name__)

FINETUNING_KEYS = ("recipe", "flags", "random")
OWN = ("seed", "output_dir", "config")  # set by the tool for each run


KEYS = ("title", "script", "recipe", "flags", "axes", "search", "seeds", "against", *HEADS, "probe", "lengths")


@dataclass(frozen=True)
class Finetuning:
    """Fine-tuning of each encoder: its flags, and whether to fine-tune random weights too."""

    arguments: tuple[str, ...] = ()
    random: bool = False

    def check(self, head: Head) -> None:
        """Parse the flags and read the labels. UserError for what fine-tuning would refuse, before anything trains."""
        arguments = [*self.arguments, "--model_name_or_path", "unused", "--output_dir", "unused"]
        model_args, data_args, _ = parse_arguments(head.groups, arguments)
        head.load(model_args, data_args)


@dataclass(frozen=True)
class Probe:
    """The probe of each encoder: flags of `run_probe.py`."""

    arguments: tuple[str, ...] = ()

    def check(self) -> None:
        """Parse the flags and read the labels. UserError for what the probe would refuse, before anything trains."""
        (args,) = parse_arguments((ProbeArguments,), [*self.arguments, "--model_name_or_path", "unused"])
        load_labelled(args)


@dataclass
class Plan:
    """A comparison as its YAML file describes it; see the module's docstring."""

    title: str
    shared: tuple[str, ...]
    variants: dict[str, dict[str, Any]]
    axes: dict[str, list[str]] = field(default_factory=dict)
    search: dict[str, list[str]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    against: dict[str, list[str]] = field(default_factory=dict)
    heads: dict[str, Finetuning] = field(default_factory=dict)
    probe: Probe | None = None
    lengths: dict[str, list[int]] = field(default_factory=dict)
    own_search: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # flag -> variant -> values
    script: str | None = None

    def run(
        self, variant: str, searched: tuple[tuple[str, str], ...], seed: int, length: int | None = None
    ) -> PlannedRun:
        flags = self.variants[variant] | dict(searched) | ({"max_steps": str(length)} if length else {})
        arguments = (*self.shared, *flag_arguments(flags, variant), "--seed", str(seed))
        return PlannedRun(variant, searched, seed, arguments, length)

    def searched(self, variant: str) -> dict[str, list[str]]:
        """The values of each searched flag that a variant can choose from."""
        return {flag: self.own_search.get(flag, {}).get(variant, values) for flag, values in self.search.items()}

    def search_runs(self) -> list[PlannedRun]:
        """Every variant at each of its searched settings, with the first seed."""
        settings = list(itertools.product(*([(name, v) for v in values] for name, values in self.search.items())))
        return [
            self.run(variant, setting, self.seeds[0])
            for setting in settings
            for variant in self.variants
            if all(value in self.searched(variant)[name] for name, value in setting)
        ]

    def length_runs(self, best: dict[str, tuple[tuple[str, str], ...]]) -> list[PlannedRun]:
        """Every seed of the baselines' schedules of other lengths, at the setting that was best at the plan's
        length."""
        return [
            self.run(baseline, best[baseline], seed, length)
            for baseline, lengths in self.lengths.items()
            if baseline in best
            for length in lengths
            for seed in self.seeds
        ]

    def seed_runs(self, best: dict[str, tuple[tuple[str, str], ...]]) -> list[PlannedRun]:
        """The other seeds of every variant at its best setting."""
        return [self.run(variant, best[variant], seed) for seed in self.seeds[1:] for variant in best]

    def check(self) -> None:
        """Parse the flags of every run. UserError for one that a run would refuse, or if data are missing.

        Another script parses its own flags.
        """
        if self.script is not None:
            if not Path(self.script).is_file():
                raise UserError(
                    f"the plan's script {self.script} does not exist; paths are relative to the working directory"
                )
            if self.heads or self.probe is not None:
                names = ", ".join((*HEADS, "probe"))
                raise UserError(f"{names} work only with hf-dbp pretrain; remove them from a plan with a script")
            return
        for planned in self.search_runs():
            _, data_args, _, args = parse_arguments(pretraining.GROUPS, [*planned.arguments, "--output_dir", "unused"])
            ImageSource(**asdict(data_args))
            if not args.do_train:
                raise UserError("the plan's runs would train nothing: add do_train: true to its flags, or a recipe")
            if args.max_steps in self.lengths.get(planned.variant, ()):
                raise UserError(
                    f"lengths of {planned.variant} names {args.max_steps}, its own --max_steps; leave it out"
                )
        checks = {name: functools.partial(part.check, HEADS[name]) for name, part in self.heads.items()}
        for name, check in (checks | ({} if self.probe is None else {"probe": self.probe.check})).items():
            try:
                check()
            except UserError as error:
                raise UserError(f"{name}: {error}") from error


def read_plan(name: str, extra: Sequence[str] = ()) -> Plan:
    """Read a plan.

    Args:
        name: YAML file, or name of a plan in the package.
        extra: the user's flags for all runs, which override the plan's.

    Raises:
        UserError: there is no such plan, it is invalid, or ``extra`` sets what the plan varies.
    """
    if not Path(name).is_file() and name not in plan_names():
        raise UserError(f"no plan {name!r}: give a YAML file or one of {', '.join(plan_names())}")
    content = read_yaml(recipe_path(name))
    if not isinstance(content, dict) or not content.get("axes"):
        raise UserError(f"plan {name} must be a mapping with at least `axes`; see hf_dbp/comparison/plans.py")
    unknown = sorted(content.keys() - set(KEYS))
    if unknown:
        raise UserError(f"plan {name}: unknown key {unknown[0]!r}; a plan has {', '.join(KEYS)}")
    axes = check_axes(content["axes"], name)
    mappings = ("search", "flags", "against", *HEADS, "probe", "lengths")
    parts = {key: mapping(content, key, name) for key in mappings}
    for key in (*HEADS, "probe"):
        if key in content and content[key] in ({}, ""):
            raise UserError(f"plan {name}: {key} is empty; give it flags, or leave it out")
    for key in ("title", "recipe", "script"):
        if not isinstance(content.get(key, ""), str):
            raise UserError(f"plan {name}: {key} is {content[key]!r:.80}; expected text")
    variants = {}
    for labels in itertools.product(*axes.values()):
        overrides = [axes[axis][label] for axis, label in zip(axes, labels, strict=True)]
        variants[", ".join(labels)] = {flag: value for flags in overrides for flag, value in flags.items()}
    search, own_search = check_search(parts["search"], list(variants), name)
    against = check_against(parts["against"], list(variants), name)
    varied = {flag for flags in variants.values() for flag in flags} | search.keys() | set(OWN)
    given = flag_names(extra)
    if given & varied:
        raise UserError(f"--{min(given & varied)} is set by the plan for each run; leave it out")
    shared = [*(recipe_arguments(content["recipe"]) if "recipe" in content else [])]
    shared += [*flag_arguments(parts["flags"], f"plan {name}"), *extra]
    return Plan(
        title=content.get("title", Path(name).stem),
        shared=tuple(shared),
        variants=variants,
        axes={axis: list(values) for axis, values in axes.items()},
        search=search,
        seeds=check_seeds(content.get("seeds", ["0"]), name),
        against=against,
        heads={head: read_finetuning(parts[head], head, name) for head in HEADS if parts[head]},
        probe=read_probe(parts["probe"], name),
        lengths=check_lengths(parts["lengths"], list(against), name),
        own_search=own_search,
        script=content.get("script"),
    )


def mapping(content: dict[str, Any], key: str, name: str) -> dict[str, Any]:
    """The mapping under a key of a plan, empty if there is none. UserError if it is something else."""
    value = content.get(key) or {}
    if value in ("null", "~"):
        return {}
    if not isinstance(value, dict):
        raise UserError(f"plan {name}: {key} is {value!r:.80}; expected a mapping")
    return value


def read_finetuning(settings: dict[str, Any], head: str, name: str) -> Finetuning:
    """The plan's settings for a head. UserError for invalid ones."""
    unknown = sorted(settings.keys() - set(FINETUNING_KEYS))
    if unknown:
        raise UserError(f"plan {name}: {head} has {', '.join(FINETUNING_KEYS)}; not {unknown[0]!r}")
    random = typed(settings.get("random", "false"))
    if not isinstance(random, bool):
        raise UserError(f"plan {name}: random of {head} is {random!r:.80}; expected true or false")
    if not isinstance(settings.get("recipe", ""), str):
        raise UserError(f"plan {name}: recipe of {head} is {settings['recipe']!r:.80}; expected text")
    arguments = recipe_arguments(settings["recipe"]) if "recipe" in settings else []
    arguments += flag_arguments(mapping(settings, "flags", name), f"plan {name}, {head}")
    return Finetuning(tuple(arguments), random)


def read_probe(settings: dict[str, Any], name: str) -> Probe | None:
    """The plan's settings for the probe; None if there are none. UserError for invalid ones."""
    unknown = sorted(settings.keys() - {"flags"})
    if unknown:
        raise UserError(f"plan {name}: probe has flags; not {unknown[0]!r}")
    arguments = flag_arguments(mapping(settings, "flags", name), f"plan {name}, probe")
    return Probe(tuple(arguments)) if settings else None


def check_search(
    search: dict[str, Any], variants: list[str], name: str
) -> tuple[dict[str, list[str]], dict[str, dict[str, list[str]]]]:
    """Flag -> all searched values, and flag -> variant -> its values if the variants have separate ones.

    Raises:
        UserError: a flag has values for only some variants, or for unknown ones.
    """
    every: dict[str, list[str]] = {}
    own: dict[str, dict[str, list[str]]] = {}
    for flag, values in search.items():
        if isinstance(values, dict):
            if values.keys() != set(variants):
                raise UserError(f"plan {name}: search of {flag} must name every variant: {', '.join(variants)}")
            own[flag] = {variant: v if isinstance(v, list) else [v] for variant, v in values.items()}
            every[flag] = list(dict.fromkeys(value for mine in own[flag].values() for value in mine))
            if all(is_number(value) for value in every[flag]):
                every[flag].sort(key=float)
        else:
            every[flag] = values if isinstance(values, list) else [values]
    return every, own


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def check_lengths(lengths: dict[str, Any], baselines: list[str], name: str) -> dict[str, list[int]]:
    """Baseline -> steps of its complete schedules of other lengths.

    UserError for invalid steps or an unknown baseline.
    """
    found = {}
    for baseline, steps in lengths.items():
        if baseline not in baselines:
            raise UserError(f"plan {name}: lengths names {baseline!r}; the baselines are {', '.join(baselines)}")
        texts = steps if isinstance(steps, list) else [steps]
        if not all(isinstance(text, str) and text.isdecimal() and int(text) > 0 for text in texts):
            raise UserError(f"plan {name}: lengths are numbers of steps, got {steps!r:.80} for {baseline}")
        found[baseline] = sorted({int(text) for text in texts})
    return found


def check_axes(axes: Any, name: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The axes, each label with its flags. UserError if they are not mappings of mappings."""
    is_mapping = isinstance(axes, dict) and all(isinstance(values, dict) and values for values in axes.values())
    if not is_mapping or not all(isinstance(flags, dict) for values in axes.values() for flags in values.values()):
        raise UserError(f"plan {name}: axes are mappings, axis -> label -> flags")
    return axes  # type: ignore[no-any-return]


def check_seeds(seeds: Any, name: str) -> tuple[int, ...]:
    """The seeds as numbers. UserError if there are none or they repeat."""
    try:
        numbers = tuple(int(seed) for seed in (seeds if isinstance(seeds, list) else [seeds]))
    except (TypeError, ValueError) as error:
        raise UserError(f"plan {name}: seeds are whole numbers, got {seeds}") from error
    if not numbers or len(set(numbers)) < len(numbers):
        raise UserError(f"plan {name}: seeds must be different and at least one, got {seeds}")
    return numbers


def check_against(against: dict[str, Any], variants: list[str], name: str) -> dict[str, list[str]]:
    """Baseline -> variants compared with it, by default the first and all others. UserError for unknown ones."""
    against = against or {variants[0]: variants[1:]}
    if not all(isinstance(others, list) for others in against.values()):
        raise UserError(f"plan {name}: against maps a baseline to a list of variants; got {against!r:.80}")
    named = [*against, *(other for others in against.values() for other in others)]
    for variant in named:
        if variant not in variants:
            raise UserError(f"plan {name}: against names {variant!r}; the variants are {', '.join(variants)}")
    return {baseline: list(others) for baseline, others in against.items()}


def plan_of(runs: Sequence[Run]) -> Plan:
    """The plan that collected runs amount to; plain AdamW, if present, is the baseline."""
    order = sorted({run.planned.variant for run in runs}, key=lambda name: (name.startswith("dbp+"), name))
    variants = sorted(order, key=lambda name: name != "adamw")
    against = {variants[0]: variants[1:]}
    if "muon" in variants[1:] and "dbp+muon" in variants:
        against["muon"] = ["dbp+muon"]
    search: dict[str, list[str]] = {}
    for run in runs:
        for flag, value in run.planned.searched:
            search[flag] = sorted({*search.get(flag, []), value})
    seeds = tuple(sorted({run.planned.seed for run in runs}))
    return Plan("Finished runs", (), {name: {} for name in variants}, {"method": variants}, search, seeds, against)
