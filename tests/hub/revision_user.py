"""Claims a push to a branch, says so, and pushes: main([FOLDER, HUB_ID, BRANCH]). Run by test_revision."""

from pathlib import Path

from transformers import TrainingArguments

from hf_dbp.errors import command
from hf_dbp.hub.publishing import claim_push


@command
def main(arguments: list[str]) -> None:
    folder, repo_id, revision = arguments
    args = TrainingArguments(
        folder, push_to_hub=True, hub_model_id=repo_id, hub_revision=revision, report_to="none", use_cpu=True
    )
    destination = claim_push(args)
    print("training begins", flush=True)
    assert destination is not None
    print(destination.push(Path(folder)))
