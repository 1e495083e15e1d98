from hybridvit.data.catalog import datasets_table
from hybridvit.data.names import PUBLIC


def test_all_built_in_sets_but_folders_of_ones_own_are_public() -> None:
    assert datasets_table().keys() - PUBLIC == {"image_folder"}
    assert datasets_table().keys() >= PUBLIC
