"""A branch that does not exist is made before training; a pull request that does not exist is refused before it."""

import pytest
from hub_models import TOKEN, ModelHub, run_commands
from loopback import hub_environment


@pytest.mark.slow
def test_a_branch_is_made_and_a_pull_request_must_be_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    names = ["dev", "dev", "main", "refs/pr/9"]
    commands = [("hub.revision_user", [tmp_path, "me/vit", name], TOKEN) for name in names]
    with ModelHub() as hub:
        made, again, plain, refused = run_commands(commands, hub_environment(hub.url, tmp_path / "home"))
        requests = hub.requests
        branches = hub.repositories["me/vit"].branches
    for ended in (made, again, plain):
        assert ended.status == 0, ended.output
    assert branches == {"main", "dev"}
    posted = [path for method, path in requests if method == "POST"]
    assert posted.index("/api/models/me/vit/branch/dev") < posted.index("/api/models/me/vit/commit/dev")
    assert refused.status == 2 and "training begins" not in refused.output
    assert "there is no repository or branch with that name: me/vit" in refused.error
