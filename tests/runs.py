"""Records of runs that never ran, for tests of what is made of them."""

import math

from hf_dbp.comparison.plans import Plan
from hf_dbp.comparison.runs import PlannedRun, Run
from hf_dbp.records import RunRecord

NAN = math.nan
SLOW, QUICK = (1.0, 0.8, 0.6, 0.5), (0.9, 0.6, 0.5, 0.4)


def made_run(variant="adamw", seed=0, losses=(1.0, 0.8, 0.6, 0.5), *, step=10, second=1.0, searched=(), **fields):
    """A finished run with an evaluation every ``step`` steps; a step takes ``second`` seconds and a kWh."""
    method = "dbp" if "dbp" in variant else "bp"
    rows = [
        {
            "step": k * step,
            "epoch": k / 2,
            "train_seconds": k * step * second,
            "kwh": k * step * 1.0,
            "co2e_kg": k * step * 0.5,
            "step_seconds": second,
            "load_average": 1.5,
            "eval_loss": loss,
            "train_loss": loss - 0.1,
            "decorrelation_loss": 0.1 / k,
            "mean_squared_correlation": 0.2 / k,
        }
        for k, loss in enumerate(losses, start=1)
    ]
    record = RunRecord(
        "pretraining",
        method,
        variant.removeprefix("dbp+"),
        seed,
        arguments={"max_steps": len(losses) * step, "num_train_epochs": 3.0, "per_device_train_batch_size": 8}
        | {"learning_rate": 1e-3, "output_dir": f"{variant}-{seed}", "seed": seed},
        data={"source": "made up", "train_images": 16, "validation_images": 4, "size": [32, 32], "channels": 3},
        hardware={"processor": "abacus", "cores": 1, "processes": 1},
        versions={"python": "3"},
        commit="0" * 40,
        rows=rows,
        energy=dict.fromkeys(("country", "cpu", "cpu_model", "ram", "gpu", "scope", "codecarbon"), "made up")
        | {"carbon_intensity_g_per_kwh": 500.0},
        results={"finished": True, "train_seconds": rows[-1]["train_seconds"], "kwh": rows[-1]["kwh"]}
        | {"co2e_kg": rows[-1]["co2e_kg"]},
    )
    return Run(PlannedRun(variant, tuple(searched), seed), record, **fields)


def made_plan(variants=("adamw", "dbp+adamw"), seeds=(0, 1, 2), **fields):
    against = {variants[0]: list(variants[1:])}
    flags = {name: {} for name in variants}
    return Plan("Made up", (), flags, {"method": list(variants)}, {}, tuple(seeds), against, **fields)
