"""Makes docs/flags.md from the flags' help texts: python tests/flags_page.py > docs/flags.md"""

import argparse
from collections.abc import Sequence
from typing import Any

from hf_dbp.downstream.classification import arguments as classify
from hf_dbp.downstream.detection import arguments as detect
from hf_dbp.downstream.probe import ProbeArguments
from hf_dbp.downstream.segmentation import arguments as finetuning
from hf_dbp.flags import FlagParser
from hf_dbp.training import arguments as pretraining

COMMANDS: dict[str, tuple[type, ...]] = {
    "hf-dbp pretrain": pretraining.GROUPS,
    "hf-dbp finetune": finetuning.GROUPS,
    "hf-dbp classify": classify.GROUPS,
    "hf-dbp detect": detect.GROUPS,
    "hf-dbp probe": (ProbeArguments,),
}
HEAD = """# Flags

Commands take the flags below, and those that train also take all of transformers' `TrainingArguments` (`--help-all`
lists them). `--config RECIPE` reads flags from a YAML file, your own or one from the package; flags that you type
override it. The defaults of `hf-dbp pretrain` are those of run_mae.py and, but for the interval, schedule and bound of
eta, of the paper; `hf-dbp pretrain IMAGES` alone takes the recipe `whole_model.yaml` instead. This page is generated
from `--help`.
"""


def default(action: argparse.Action) -> str:
    """The default of a flag; empty if there is none or the help text names it."""
    if action.required:
        return "required"
    return "" if action.default in (None, "") or "efault" in told(action) else f"`{action.default}`"


def told(action: argparse.Action) -> str:
    return str(action.help).replace(" (default: %(default)s)", "").replace("%%", "%").replace("|", "\\|")


def rows(actions: Sequence[argparse.Action]) -> list[str]:
    lines = ["| flag | meaning | default |", "| --- | --- | --- |"]
    for action in actions:
        choices = f": {', '.join(f'`{one}`' for one in action.choices)}" if action.choices else ""
        lines.append(f"| `{action.option_strings[0]}`{choices} | {told(action)} | {default(action)} |")
    return lines


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for command, groups in COMMANDS.items():
        parts.append(f"## {command}\n")
        sections: list[tuple[str, list[Any]]] = list(FlagParser(groups).sections())[1:]
        parts += [f"### {title}\n\n" + "\n".join(rows(actions)) + "\n" for title, actions in sections if actions]
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
