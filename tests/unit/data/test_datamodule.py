"""If these fail, Lightning feeds a run other data than configured, above all after a resume."""

import json
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback

from patcher_pl.data import ChatFormat, Mixture, SafetyDataModule, Source
from patcher_pl.errors import ConfigError, DataError
from tests.families import build_tokenizer

# Lightning 2.6 uses a class that torch has deprecated since.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


@pytest.fixture
def make_mixture(tmp_path):
    def make(name: str, num_rows: int = 14, **options) -> Mixture:
        path = tmp_path / f"{name}.jsonl"
        rows = [
            {"prompt": f"{name} {n}?", "response": "Stir. " * (n % 5 + 1)} for n in range(num_rows)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Mixture(sources=[Source(path=str(path))], **options)

    return make


class Recorder(LightningModule):
    """A model that only writes down which batches it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer("qwen2")
        self.language_model = SimpleNamespace(load_chat=ChatFormat)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.safe: list[list[list[int]]] = []
        self.attack: list[list[list[int]]] = []
        self.val: list[list[list[int]]] = []

    def training_step(self, batch, batch_idx):
        self.safe.append(batch["input_ids"].tolist())
        datamodule = self.trainer.datamodule
        if datamodule.has_attack:
            self.attack.append(next(datamodule.attack_stream().endless())["input_ids"].tolist())
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.val.append(batch["input_ids"].tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAfter(Callback):
    """Writes a checkpoint in the middle of training and stops there."""

    def __init__(self, num_steps: int, path) -> None:
        self.num_steps, self.path = num_steps, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.num_steps:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def fit(datamodule, folder, *, max_steps=9, ckpt_path=None, callbacks=()):
    model = Recorder()
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=max_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
    )
    trainer.fit(model, datamodule, ckpt_path=ckpt_path)
    return model


def texts(batches) -> list[str]:
    tokenizer = build_tokenizer("qwen2")
    rows = [tokenizer.decode(row) for batch in batches for row in batch]
    return [row.replace(tokenizer.pad_token, "") for row in rows]


def test_training_goes_through_every_row_each_epoch(make_mixture, tmp_path):
    model = fit(SafetyDataModule(make_mixture("tea"), seed=3), tmp_path, max_steps=8)
    assert [len(batch) for batch in model.safe] == [4] * 8  # 14 rows are 4 batches
    for epoch in (model.safe[:4], model.safe[4:]):
        whole = " ".join(texts(epoch))
        assert all(f"tea {n}?" in whole for n in range(14))
    assert model.safe[:4] != model.safe[4:]


def test_a_run_resumed_in_the_middle_of_an_epoch_sees_the_same_batches(make_mixture, tmp_path):
    def make() -> SafetyDataModule:
        return SafetyDataModule(
            make_mixture("tea"), make_mixture("doom"), attack_batch_size=3, seed=3
        )

    whole = fit(make(), tmp_path)
    checkpoint = tmp_path / "step.ckpt"
    first = fit(make(), tmp_path, callbacks=[SaveAfter(6, checkpoint)])
    second = fit(make(), tmp_path, ckpt_path=checkpoint)
    assert first.safe + second.safe == whole.safe
    assert first.attack + second.attack == whole.attack


def test_a_resumed_run_keeps_its_seed_whatever_the_config_says_now(make_mixture, tmp_path):
    whole = fit(SafetyDataModule(make_mixture("tea", num_examples=8), seed=3), tmp_path)
    checkpoint = tmp_path / "step.ckpt"
    mixture = make_mixture("tea", num_examples=8)
    keep = SaveAfter(5, checkpoint)
    first = fit(SafetyDataModule(mixture, seed=3), tmp_path, callbacks=[keep])
    second = fit(SafetyDataModule(mixture, seed=4), tmp_path, ckpt_path=checkpoint)
    assert first.safe + second.safe == whole.safe


def test_subset_and_order_follow_the_seed_of_the_run(make_mixture, tmp_path):
    def rows(**options) -> list[str]:
        datamodule = SafetyDataModule(make_mixture("tea", num_examples=8), **options)
        return texts(fit(datamodule, tmp_path, max_steps=2).safe)

    seed_everything(11)
    everywhere = rows()
    assert rows() == everywhere
    seed_everything(12)
    assert set(rows()) != set(everywhere)
    assert set(rows(seed=1)) != set(rows(seed=2))
    assert rows(seed=1) == rows(seed=1)


def test_safe_and_attack_draw_different_rows_from_the_same_file(make_mixture, tmp_path):
    both = make_mixture("tea", num_rows=40, num_examples=8)
    model = fit(SafetyDataModule(both, both, seed=1), tmp_path, max_steps=2)
    assert set(texts(model.safe)) != set(texts(model.attack))


def test_the_attacker_keeps_its_place_in_its_own_stream(make_mixture, tmp_path):
    datamodule = SafetyDataModule(make_mixture("tea"), make_mixture("doom"), seed=1)
    fit(datamodule, tmp_path, max_steps=3)
    stream = datamodule.attack_stream()
    assert stream is datamodule.attack_stream()
    assert stream.position == 3
    assert list(islice(stream.endless(), 2)) and stream.position == 5
    place = {"position": 5, "rows_per_step": 4}
    assert datamodule.state_dict() == {"seed": 1, "attack": place}


def test_validation_sees_every_row_once_in_the_same_order(make_mixture, tmp_path):
    datamodule = SafetyDataModule(make_mixture("tea"), val=make_mixture("soup", 6), seed=1)
    model = fit(datamodule, tmp_path, max_steps=8)
    assert [len(batch) for batch in model.val] == [4, 2] * 2  # two epochs
    assert model.val[:2] == model.val[2:]


def test_validate_alone_needs_only_validation_data(make_mixture, tmp_path):
    datamodule = SafetyDataModule(make_mixture("tea"), val=make_mixture("soup", 6), seed=1)
    (tmp_path / "tea.jsonl").unlink()
    model = Recorder()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.validate(model, datamodule, verbose=False)
    assert len(model.val) == 2
    with pytest.raises(ConfigError, match=r"SafetyDataModule\.val is not set"):
        trainer.validate(model, SafetyDataModule(make_mixture("tea"), seed=1), verbose=False)


def test_bad_data_stops_before_training(make_mixture, tmp_path):
    datamodule = SafetyDataModule(make_mixture("tea"), make_mixture("doom"), seed=1)
    (tmp_path / "doom.jsonl").write_text('{"prompt": "x"}\n')

    class NoTraining(Callback):
        def on_fit_start(self, trainer, pl_module):
            pytest.fail("fit went on with bad attack data")

    with pytest.raises(DataError, match=r"doom\.jsonl:1: field `response` is missing"):
        fit(datamodule, tmp_path, callbacks=[NoTraining()])


def test_a_defense_that_needs_attack_data_is_told_which_key_to_set(make_mixture, tmp_path):
    datamodule = SafetyDataModule(make_mixture("tea"), seed=1)
    fit(datamodule, tmp_path, max_steps=1)
    with pytest.raises(ConfigError, match=r"SafetyDataModule\.attack is not set"):
        datamodule.attack_stream()


def test_streams_without_a_trainer_say_what_is_missing(make_mixture):
    with pytest.raises(ConfigError, match="Trainer"):
        SafetyDataModule(make_mixture("tea"), seed=1).train_dataloader()


def test_importing_the_package_does_not_import_lightning():
    import subprocess
    import sys

    code = (
        "import sys, patcher_pl.data; "
        "heavy = {'lightning', 'transformers', 'datasets'} & set(sys.modules); "
        "assert not heavy, heavy; "
        "from patcher_pl.data import SafetyDataModule; assert 'lightning' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("field", ["batch_size", "attack_batch_size"])
def test_bad_settings_are_refused(make_mixture, field):
    with pytest.raises(ValueError, match=rf"SafetyDataModule\.{field} must be >= 1, got 0"):
        SafetyDataModule(make_mixture("tea"), **{field: 0})


def test_configs_name_the_datamodule_by_its_short_path(make_mixture):
    from jsonargparse import ArgumentParser
    from lightning import LightningDataModule

    (source,) = make_mixture("tea").sources
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    mixture = {"sources": [{"path": source.path, "weight": 2}], "num_examples": 4}
    config = {
        "class_path": "patcher_pl.data.SafetyDataModule",
        "init_args": {"safe": mixture, "attack": mixture, "batch_size": 2},
    }
    datamodule = parser.instantiate(parser.parse_object({"data": config})).data
    assert isinstance(datamodule, SafetyDataModule)
    assert datamodule.has_attack


def test_what_defender_and_attacker_were_given_is_known(make_mixture, tmp_path):
    """Wrong if the results could not say which share of harmful rows was trained on."""
    model = Recorder()
    long = {"prompt": "Why? " * 400, "response": "Stir."}
    rows = [{"prompt": f"How {n}?", "response": "Stir."} for n in range(4)] + [long] * 2
    path = tmp_path / "harmful.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    harmful = Source(path=str(path), harmful=True)
    attack = Mixture(sources=[*make_mixture("mild").sources, harmful], poison_ratio=0.25)
    data = SafetyDataModule(safe=make_mixture("safe"), attack=attack, batch_size=2, seed=0)
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    assert data.shares == {
        "safe": {"num_rows": 14, "poison_ratio": 0.0, "num_dropped": 0},
        "attack": {"num_rows": 16, "poison_ratio": 0.25, "num_dropped": 2},
    }
