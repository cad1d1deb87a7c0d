"""The catalogue's names are real: timm's own list of released weights has them."""

import pytest

from vitrail.models import list_models
from vitrail.weights import hub
from vitrail.weights.catalogue import RELEASED, weight_sources


@pytest.fixture(scope="module")
def timm_configs():
    timm = pytest.importorskip("timm")
    from timm.models import get_pretrained_cfg

    names = timm.list_pretrained()
    return {cfg.hf_hub_id: cfg for cfg in map(get_pretrained_cfg, names) if cfg.hf_hub_id}


def test_every_timm_name_is_one_that_timm_has(timm_configs):
    for sources in RELEASED.values():
        for source in sources:
            if source.startswith("hf:timm/"):
                assert source.removeprefix("hf:") in timm_configs


def test_every_file_of_dinov2_is_the_one_that_timm_converted(timm_configs):
    addresses = {cfg.url for cfg in timm_configs.values()}
    for name in ("vit_small_patch14_dinov2", "vit_giant_patch14_reg4_dinov2"):
        assert weight_sources(name)[-1] in addresses


def test_every_source_is_a_hub_name_or_an_address():
    for sources in RELEASED.values():
        for source in sources:
            if source.startswith("hf:"):
                repo, file, revision = hub.parse(source)
                assert repo == source.removeprefix("hf:")
                assert file is None
                assert revision is None, "no invented revisions"
            else:
                assert source.startswith("https://")
                assert source.endswith(".pth")


@pytest.mark.parametrize("name", list_models())
def test_every_model_tells_its_sources(name):
    assert isinstance(weight_sources(name), list)
