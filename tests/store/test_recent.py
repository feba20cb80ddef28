"""A table that forgets what was put in first."""

from peft_fx.store.recent import Recent


def test_what_came_first_goes_first():
    table = Recent(2)
    for i in range(5):
        table[i] = str(i)
        assert len(table) == min(i + 1, 2)
    assert dict(table) == {3: "3", 4: "4"} and table.get(0) is None


def test_what_is_put_in_again_takes_no_further_room():
    table = Recent(2)
    for key in ("a", "b", "b", "a"):
        table[key] = key
    assert dict(table) == {"a": "a", "b": "b"}
