"""Evaluating without training: whose model is evaluated, and that nothing but the result is written."""

import json

import pytest
from test_pretraining import contents, flags, losses

from hf_dbp.pretraining import main


def test_evaluation_alone_leaves_a_run_as_it_is(tmp_path, capsys):
    """The run's own model is evaluated, by its own statistics, mask ratio and target; an unfinished run's best too."""
    run = tmp_path / "run"
    trained = main(flags(run, num_train_epochs=1, mask_ratio=0.5, norm_pix_loss=True))
    before = contents(run)
    for source in (run, run / "checkpoint-3"):
        record = main(flags(run, do_train=False))
        assert losses(record) == pytest.approx(losses(trained), rel=1e-5)
        results = json.loads((run / "eval_results.json").read_text())
        assert (results["eval_loss"], results["model"]) == (losses(record)[0], str(source))
        (run / "eval_results.json").unlink()
        assert contents(run) == before
        (run / "config.json").unlink(missing_ok=True)  # as of a run that is not at its end
        before.pop(run / "config.json", None)
    other = tmp_path / "other"
    named = main(flags(other, do_train=False, model_name_or_path=run / "checkpoint-3"))
    assert losses(named) == losses(record)
    assert [file.name for file in contents(other)] == ["eval_results.json"]
    assert "validation loss" in capsys.readouterr().out


def test_evaluation_of_no_model_says_so_and_no_flag_is_a_mistake(tmp_path, caplog, capsys):
    main(flags(tmp_path / "none", do_train=False))
    assert f"no --model_name_or_path and no run in {tmp_path / 'none'}: evaluating an untrained model" in caplog.text
    assert "of an untrained model" in capsys.readouterr().out
    assert [file.name for file in contents(tmp_path / "none")] == ["eval_results.json"]
    for changed, message in (
        ({"do_eval": False, "eval_strategy": "no"}, "error: nothing to do: give --do_train, --do_eval or both"),
        ({"push_to_hub": True}, "error: --push_to_hub pushes what --do_train trains"),
    ):
        with pytest.raises(SystemExit):
            main(flags(tmp_path / "nothing", do_train=False, **changed))
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith(message)
        assert not (tmp_path / "nothing").exists()
