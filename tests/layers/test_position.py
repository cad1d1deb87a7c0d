import torch

from vitrail.layers.position import resample_positions


def test_autocast_does_not_coarsen_a_resampled_table():
    table = torch.randn(1, 6 * 6, 4, generator=torch.Generator().manual_seed(0))
    want = resample_positions(table, (6, 6), (5, 9), antialias=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = resample_positions(table, (6, 6), (5, 9), antialias=True)
    assert torch.equal(got, want)
