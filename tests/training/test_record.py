"""A folder belongs to one run: another is refused naming what differs, and what a run was stands beside its result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf

from oscar.codec import OscarCodec
from oscar.config import ConfigError, TrainConfig
from oscar.training.build import build_stage
from oscar.training.checkpoints import find_checkpoints
from oscar.training.record import MAY_CHANGE, flatten, may_change
from oscar.training.trainer import Trainer
from oscar.utils.provenance import PROVENANCE, read_model

pytestmark = pytest.mark.usefixtures("quick_tables")


@pytest.fixture
def configure(compose, photos: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(stage: str, *overrides: str, output: str = "run") -> TrainConfig:
        rates = (
            []
            if any("rates=" in override or "init_from" in override for override in overrides)
            else ["bottleneck.rates=[0.0019,0.125]"]
        )
        return compose(
            f"experiment=tiny/{stage}",
            f"data.train=[{photos}]",
            f"output={tmp_path / output}",
            "trainer.max_steps=2",
            "logger.tensorboard=false",
            *rates,
            *overrides,
        )

    return make


def run(config: TrainConfig, *overrides: str) -> Trainer:
    trainer = Trainer(build_stage(config), config, overrides=overrides)
    assert trainer.run()
    return trainer


def record(config: TrainConfig) -> dict:
    return json.loads(Path(config.output, "provenance.json").read_text())


def snapshot(config: TrainConfig) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(config.output).rglob("*") if path.is_file()}


CHANGES = [
    ("optimiser.lr=1e-3", r"optimiser\.lr was 5e-05, is 0\.001"),
    ("seed=1", "seed was 0, is 1"),
    ("stage.cosine=0.5", r"stage\.cosine was 1\.0, is 0\.5"),
    ("data.augment=false", "data.augment was True, is False"),
    ("timesteps=linear", "timesteps.first was None, is 500; timesteps.kind was 'table', is 'linear'"),
    ("bottleneck.decay=0.9", r"bottleneck\.decay was 0\.8, is 0\.9"),
    ("+stage.rate_weights={0.125: 2}", r"stage\.rate_weights\.0\.125 was None, is 2\.0"),
    ("denoiser.lora_rank=4", r"denoiser\.lora_rank was 2, is 4"),
    ("optimiser.schedule=cosine", "optimiser.schedule was 'constant', is 'cosine'"),
    ("trainer.mixed_precision=bf16", "trainer.mixed_precision was 'no', is 'bf16'"),
]


def test_another_run_is_refused(configure) -> None:
    config = configure("bottleneck")
    run(config)
    before = snapshot(config)
    for override, named in CHANGES:
        AcceleratorState._reset_state(reset_partial_state=True)
        other = configure("bottleneck", override, "trainer.max_steps=4")
        message = rf"^output is {config.output}, which holds another run: .*{named}"
        with pytest.raises(ConfigError, match=message) as error:
            run(other)
        line = str(error.value)
        assert "trainer.resume=false to start anew, or another output" in line and "\n" not in line
    assert snapshot(config) == before  # config.yaml too


def test_runs_from_before_stages_were_renamed_go_on(configure) -> None:
    config = configure("bottleneck")
    run(config)
    path = Path(config.output) / "provenance.json"
    record = json.loads(path.read_text())
    record["identity"]["stage.name"] = "hyper"
    path.write_text(json.dumps(record))
    run(configure("bottleneck", "trainer.max_steps=3"))
    assert json.loads(path.read_text())["finished"]["step"] == 3


def test_other_images_are_another_run(configure, photos: Path, tmp_path: Path) -> None:
    run(configure("bottleneck"))
    other = tmp_path / "other"
    other.symlink_to(photos)
    with pytest.raises(ConfigError, match=rf"data\.train was \['{photos}'\], is \['{other}'\]"):
        run(configure("bottleneck", f"data.train=[{other}]"))


def test_what_may_change(configure, runs) -> None:
    run(configure("bottleneck"))
    config = configure(
        "bottleneck",
        "trainer.max_steps=3",
        "trainer.keep_last=5",
        "trainer.log_every=2",
        "data.workers=1",
        "trainer.threads=1",
        "trainer.non_finite=skip",
        "logger.project=other",
    )
    run(config)
    assert runs.newest(config)["step"] == 3
    assert OmegaConf.load(Path(config.output, "config.yaml")).trainer.keep_last == 5


def test_only_keys_that_exist_may_change() -> None:
    keys = flatten(
        {
            **vars(TrainConfig()),
            "trainer": vars(TrainConfig().trainer),
            "data": vars(TrainConfig().data),
            "logger": vars(TrainConfig().logger),
            "validation": vars(TrainConfig().validation),
            "stage": vars(TrainConfig().stage),
            "backbone": vars(TrainConfig().backbone),
        }
    )
    for name in MAY_CHANGE:
        assert any(key == name or key.startswith(name) for key in keys), name
    assert may_change("logger.wandb") and not may_change("trainer.max_steps_more") and not may_change("seed")


def test_two_jobs_of_a_sweep_differ_and_equal_ones_are_equal(configure, runs) -> None:
    plain, again, other = (
        configure("joint", *options, output=name)
        for name, options in (("a", ()), ("b", ()), ("c", ("timesteps=constant",)))
    )
    for config in (plain, again, other):
        run(config)
    runs.assert_same(plain, again)
    one, two = (
        torch.cat(
            [
                value.float().flatten()
                for value in OscarCodec.from_pretrained(f"{config.output}/final").state_dict().values()
            ]
        )
        for config in (plain, other)
    )
    assert not torch.equal(one, two)
    with pytest.raises(ConfigError, match="timesteps.kind was 'table', is 'constant'"):
        run(configure("joint", "timesteps=constant", output="a"))


def test_without_resume_a_folder_changes_hands(configure) -> None:
    run(configure("bottleneck"))
    config = configure("bottleneck", "seed=1", "trainer.resume=false", "trainer.max_steps=1")
    run(config)
    assert [session["step"] for session in record(config)["sessions"]] == [0]
    assert record(config)["identity"]["seed"] == 1 and len(find_checkpoints(Path(config.output))) == 1


def test_a_folder_in_which_nothing_is_lost_is_taken(configure, monkeypatch) -> None:
    """Such as one whose run failed before its first checkpoint."""

    def fail(trainer: Trainer, batches):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_optimise", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            run(configure("bottleneck", "seed=1"))
    config = configure("bottleneck")
    run(config)
    assert record(config)["identity"]["seed"] == 0 and len(record(config)["sessions"]) == 1


def test_checkpoints_from_before_there_were_records(configure) -> None:
    config = configure("bottleneck")
    run(config)
    path = Path(config.output, "provenance.json")
    kept = path.read_text()
    path.unlink()
    with pytest.raises(ConfigError, match=r"holds a run without provenance\.json, .*; allowed: trainer\.resume=false"):
        run(config)
    path.write_text(kept[:100])
    with pytest.raises(ConfigError, match=r"whose provenance\.json cannot be read"):
        run(config)


def test_a_shorter_run_than_there_is(configure) -> None:
    run(configure("bottleneck"))
    with pytest.raises(ConfigError, match=r"trainer\.max_steps is 1, but the run in .* is at step 2; allowed: at leas"):
        run(configure("bottleneck", "trainer.max_steps=1"))


def test_a_cosine_keeps_its_length(configure, runs) -> None:
    """Of another max_steps the rates so far would not be those that the configuration says."""
    cosine = ("optimiser.schedule=cosine", "optimiser.warmup_steps=0", "trainer.checkpoint_every=1")
    whole = configure("bottleneck", *cosine, "trainer.max_steps=4", output="whole")
    run(whole)
    part = configure("bottleneck", *cosine, "optimiser.schedule_steps=4")
    run(part)
    with pytest.raises(ConfigError, match=r"schedule_steps \(trainer\.max_steps, unless it is set\) was 4, is 3; all"):
        run(configure("bottleneck", *cosine, "trainer.max_steps=3"))
    part = configure("bottleneck", *cosine, "trainer.max_steps=4")
    run(part)
    runs.assert_same(whole, part)
    with pytest.raises(ConfigError, match=r"^optimiser\.schedule_steps is 3; allowed: at least 4"):
        configure("bottleneck", *cosine, "trainer.max_steps=4", "optimiser.schedule_steps=3")
    with pytest.raises(ConfigError, match=r"^optimiser\.schedule_steps is 9, but optimiser\.schedule is 'constant'"):
        configure("bottleneck", "optimiser.schedule_steps=9")


def test_validation_may_be_turned_on_but_not_changed(configure, photos: Path) -> None:
    on = (f"validation.images={photos}", "validation.metrics.names=[psnr]")
    run(configure("diffusion_pretrain", "validation.metrics.names=[psnr]"))
    run(configure("diffusion_pretrain", *on, "trainer.max_steps=3"))
    run(configure("diffusion_pretrain", "trainer.max_steps=4"))
    with pytest.raises(ConfigError, match=r"validation\.limit was 24, is 2"):
        run(configure("diffusion_pretrain", *on, "trainer.max_steps=5", "validation.limit=2"))
    run(configure("diffusion_pretrain", *on, "trainer.max_steps=5", "validation.grid=0", "validation.every=2"))


def test_another_checkpoint_under_the_same_path(configure, tmp_path: Path) -> None:
    first = configure("bottleneck", output="first")
    run(first)
    source = f"init_from={first.output}/final"
    joint = configure("joint", source, "bottleneck.rates=null")
    run(joint)
    moved = Path(first.output, "final").rename(tmp_path / "moved")
    longer = ("bottleneck.rates=null", "trainer.max_steps=3")
    run(configure("joint", f"init_from={moved}", *longer))  # the same, elsewhere
    run(configure("bottleneck", "seed=1", "trainer.resume=false", output="first"))
    with pytest.raises(ConfigError, match=r"init_from \(its content\) was '[0-9a-f]{16}', is '[0-9a-f]{16}'"):
        run(configure("joint", source, *longer))


def test_another_backbone_under_the_same_path(configure, make_backbone, tmp_path: Path) -> None:
    make_backbone().save_pretrained(tmp_path / "backbone")
    source = f"backbone.source={tmp_path / 'backbone'}"
    run(configure("bottleneck", source))
    (tmp_path / "backbone").rename(tmp_path / "moved")
    run(configure("bottleneck", f"backbone.source={tmp_path / 'moved'}", "trainer.max_steps=3"))
    make_backbone(seed=1).save_pretrained(tmp_path / "backbone")
    with pytest.raises(ConfigError, match=r"backbone\.source \(its decoder\) was '.*'; .*\(its encoder\)"):
        run(configure("bottleneck", source, "trainer.max_steps=4"))


def test_a_second_run_in_the_folder_at_the_same_time(configure, monkeypatch) -> None:
    config = configure("bottleneck", "trainer.checkpoint_every=1")
    first = Trainer(build_stage(config), config)
    optimise = Trainer._optimise

    def overtaken(trainer: Trainer, batches):
        if trainer is first:
            run(configure("bottleneck", "seed=1"))
        return optimise(trainer, batches)

    monkeypatch.setattr(Trainer, "_optimise", overtaken)
    with pytest.raises(ConfigError, match="in which another run has begun since; this one ends without writing to it"):
        first.run()
    assert record(config)["identity"]["seed"] == 1 and record(config)["finished"]["step"] == 2


def test_a_folder_that_loses_its_record_while_a_run_goes_on(configure, monkeypatch) -> None:
    config = configure("bottleneck", "trainer.checkpoint_every=1")
    trainer = Trainer(build_stage(config), config)
    optimise = Trainer._optimise

    def cleared(trainer: Trainer, batches):
        (Path(config.output) / PROVENANCE).unlink()
        return optimise(trainer, batches)

    monkeypatch.setattr(Trainer, "_optimise", cleared)
    with pytest.raises(ConfigError, match="whose provenance.json is gone or damaged since; this one ends"):
        trainer.run()
    assert not list(Path(config.output).glob("checkpoints/*.pt"))


# What is recorded.


def test_provenance_of_a_run_and_of_its_result(configure) -> None:
    config = configure("bottleneck", "trainer.max_steps=1")
    run(config, "trainer.max_steps=1")
    config = configure("bottleneck")
    run(config, "trainer.max_steps=2")
    stored = OscarCodec.from_pretrained(f"{config.output}/final").provenance
    assert stored["step"] == 2 and stored["origin"] is None
    assert [(session["step"], session["processes"], session["overrides"]) for session in stored["sessions"]] == [
        (0, 1, ["trainer.max_steps=1"]),
        (1, 1, ["trainer.max_steps=2"]),
    ]
    environment = stored["sessions"][0]["environment"]
    assert set(environment) == {"commit", "dirty", "versions", "hardware"} and environment["versions"]["torch"]
    assert "environment" not in stored["sessions"][1]  # the same
    assert stored["config"]["bottleneck"]["width"] == 8 and stored["config"]["trainer"]["max_steps"] == 2
    own = record(config)
    assert {name: own[name] for name in ("config", "origin", "sessions")} == {
        name: stored[name] for name in ("config", "origin", "sessions")
    }
    yaml = OmegaConf.to_container(OmegaConf.load(Path(config.output, "config.yaml")))
    assert json.loads(json.dumps(yaml)) == stored["config"]


def test_info_prints_it(configure, tiny_folder, capsys) -> None:
    from oscar.cli.main import main

    config = configure("bottleneck")
    run(config, "experiment=tiny/bottleneck", "trainer.max_steps=2")
    capsys.readouterr()
    assert main(["info", f"{config.output}/final"]) == 0
    text = capsys.readouterr().out
    environment = record(config)["sessions"][0]["environment"]
    for part in (
        "trained 2 steps of stage bottleneck, seed 0",
        "experiment=tiny/bottleneck trainer.max_steps=2",
        "max_steps: 2",
        f"torch {environment['versions']['torch']}",
        environment["hardware"]["processor"],
        "rates            0.0019, 0.1250",
        "LoRA of rank 2",
    ):
        assert part in text, part
    assert main(["info", f"{config.output}/final", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["provenance"] == OscarCodec.from_pretrained(f"{config.output}/final").provenance
    assert main(["info", str(tiny_folder)]) == 0
    assert "provenance       not stored in this checkpoint" in capsys.readouterr().out


def test_provenance_changes_no_fingerprint_and_is_kept(configure, tmp_path: Path) -> None:
    config = configure("bottleneck")
    run(config)
    codec = OscarCodec.from_pretrained(f"{config.output}/final")
    before = codec.fingerprint
    codec.save_pretrained(tmp_path / "copy", torch.float32)
    copy = OscarCodec.from_pretrained(tmp_path / "copy")
    assert copy.provenance == codec.provenance is not None
    codec.provenance = None
    codec.save_pretrained(tmp_path / "bare")
    bare = OscarCodec.from_pretrained(tmp_path / "bare")
    assert bare.fingerprint == copy.fingerprint == before and bare.provenance is None


def test_provenance_goes_back_to_the_first_stage(configure) -> None:
    vae, pretrain, bottleneck, joint = ("vae", "diffusion_pretrain", "bottleneck", "joint")
    run(configure(vae, output=vae))
    run(configure(pretrain, f"backbone.source={configure(vae, output=vae).output}/final", output=pretrain))
    run(
        configure(bottleneck, f"backbone.source={configure(pretrain, output=pretrain).output}/final", output=bottleneck)
    )
    last = configure(
        joint,
        f"init_from={configure(bottleneck, output=bottleneck).output}/final",
        "bottleneck.rates=null",
        output=joint,
    )
    run(last)
    provenance, stages = read_model(f"{last.output}/final")["provenance"], []
    while provenance is not None:
        stages.append(provenance["config"]["stage"]["name"])
        provenance = (provenance["origin"] or {}).get("provenance")
    assert stages == [joint, bottleneck, pretrain, vae]
