"""Models with fresh weights: of the architecture, from a seed, and never taken for the loaded ones."""

import torch

from patcher_pl.models import LanguageModel
from patcher_pl.reports.settings import as_settings, fingerprint
from tests.adapters import base_and_adapter
from tests.families import build_family


def digest(model):
    return fingerprint(as_settings(model, for_outcome=True))


def weights(model):
    return torch.cat([entry.flatten() for entry in model.state_dict().values()])


def test_a_seed_makes_the_weights_and_the_path_the_rest(tmp_path):
    """Wrong if pretrained weights were attacked as a model that knows nothing, or all alike."""
    path = str(build_family("llama", tmp_path / "llama"))
    loaded = LanguageModel(path=path).load_model()
    state = torch.get_rng_state()
    made = [LanguageModel(path=path, from_scratch_seed=seed).load_model() for seed in (7, 7, 8)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights(made[0]), weights(made[1]))
    for other in (made[2], loaded):
        assert (weights(made[0]) == weights(other)).float().mean() < 0.5
    embeddings = made[0].get_input_embeddings().weight
    assert 0.5 < embeddings.std() / made[0].config.initializer_range < 2
    assert not made[0].training
    assert list(made[0].state_dict()) == list(loaded.state_dict())
    assert made[0].generation_config == loaded.generation_config
    half = LanguageModel(path=path, from_scratch_seed=0, dtype="bfloat16").load_model()
    assert half.dtype == torch.bfloat16


def test_fresh_weights_count_in_digests_and_loaded_ones_stay_as_they_were(tmp_path):
    """Wrong if an outcome of one were taken for the other's, or every finished attack were repeated."""
    path = str(build_family("llama", tmp_path / "llama"))
    models = [LanguageModel(path=path, from_scratch_seed=seed) for seed in (None, 0, 1)]
    assert len({digest(model) for model in models}) == 3
    plain = as_settings(models[0], for_outcome=True)
    assert "from_scratch_seed" not in plain["init_args"]
    assert as_settings(models[1])["init_args"]["from_scratch_seed"] == 0


def test_of_an_adapter_it_is_the_base_that_is_made_anew(tmp_path):
    base, adapter = base_and_adapter(tmp_path)
    made = [
        LanguageModel(path=str(path), from_scratch_seed=0).load_model() for path in (base, adapter)
    ]
    assert torch.equal(weights(made[0]), weights(made[1]))
