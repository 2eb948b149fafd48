from __future__ import annotations

import pytest

from mtserve.errors import InvalidArgument
from mtserve.trace.simulate.capacities import Capacity, capacity, split_list


@pytest.mark.parametrize(
    ("text", "pages"),
    [
        ("5%", 50),
        ("5%ws", 50),
        ("100%", 1000),
        ("250%", 2500),
        ("0.01%", 1),
        ("0", 0),
        ("0%", 0),
        ("1MiB", 256),
        ("4097", 1),
    ],
)
def test_shares_are_of_the_working_set_and_bytes_are_whole_pages(text: str, pages: int) -> None:
    found = capacity(text, 1000, 4096, "gpu_cache")
    assert found == Capacity(text, pages, 4096, pages / 1000)
    assert found.bytes == pages * 4096


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1KiB", "host_cache: '1KiB' holds no page, of which one takes 4,096 bytes"),
        ("much", "host_cache: 'much' is not a capacity"),
        ("-5%", "host_cache: '-5%ws' is not a capacity"),
        ("1e3%", "host_cache: '1e3%ws' is not a capacity"),
        ("20000%", "host_cache: '20000%ws' is outside 0 to 10000%ws"),
        ("5XB", "host_cache: unknown unit"),
        ("2000TiB", "host_cache: '2000TiB' is outside 0 to 1 PiB"),
    ],
)
def test_what_is_no_size_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        capacity(text, 1000, 4096, "host_cache")
    assert str(refused.value).startswith(message)


def test_lists_are_split_and_bounded() -> None:
    assert split_list(" 5% , 10%", "gpu_cache") == ["5%", "10%"]
    for text, message in (
        ("5%,,6%", "empty"),
        ("", "empty"),
        ("1,2,1", "'1' is named twice"),
        (",".join("abc"), "3 values"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            split_list(text, "gpu_cache", 3 if text != "a,b,c" else 2)
