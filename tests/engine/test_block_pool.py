"""The block pool against a plain model of it, and the promises that its content addresses make."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable

import pytest

import engine.block_pool
from engine.block_pool import BlockPool, extend_digests

P = 16


class PlainPool:
    """The definition: lists that are searched, whole prefixes as addresses."""

    def __init__(self, num_blocks: int) -> None:
        self.free = list(range(num_blocks))
        self.tables: list[list[int]] = []
        self.prefix_of: dict[int, tuple[object, ...]] = {}

    def find(self, salt: str, tokens: list[int], count: int) -> list[int]:
        found: list[int] = []
        for i in range(count):
            address = (salt, *tokens[: (i + 1) * P])
            matches = [block for block, prefix in self.prefix_of.items() if prefix == address]
            if not matches:
                break
            found += matches
        return found

    def share(self, blocks: list[int]) -> list[int]:
        self.free = [block for block in self.free if block not in blocks]
        return list(blocks)

    def grow(self, table: list[int], num_tokens: int) -> bool:
        missing = (num_tokens + P - 1) // P - len(table)
        if missing > len(self.free):
            return False
        for _ in range(missing):
            block = self.free.pop(0)
            self.prefix_of.pop(block, None)
            table.append(block)
        return True

    def publish(self, block: int, salt: str, prefix: list[int]) -> None:
        address = (salt, *prefix)
        if address not in self.prefix_of.values() and block not in self.prefix_of:
            self.prefix_of[block] = address

    def release(self, table: list[int], others: list[list[int]]) -> None:
        for block in reversed(table):
            if not any(block in other for other in others):
                self.free.insert(len(self.free) if block in self.prefix_of else 0, block)


def exercise(seed: int, steps: int = 150) -> None:
    """Random life of a pool beside the plain one; every answer and the order of the free list must be the same."""
    rng = random.Random(seed)
    num_blocks = rng.choice([3, 8, 20])
    pool, plain = BlockPool(num_blocks), PlainPool(num_blocks)
    live: list[tuple[list[int], list[int], list[int], list[bytes], str]] = []
    stems = [[rng.randrange(3) for _ in range(P * 6)] for _ in range(2)]
    for _ in range(steps):
        if live and rng.random() < 0.4:
            table, copy, *_ = live.pop(rng.randrange(len(live)))
            plain.release(copy, [other[1] for other in live])
            pool.release(table)
            assert table == []
        else:
            salt, stem = rng.choice(["", "s"]), rng.choice(stems)
            tokens = stem[: rng.randrange(1, len(stem))] + [rng.randrange(3) for _ in range(rng.randrange(20))]
            count = (len(tokens) - 1) // P
            digests: list[bytes] = []
            extend_digests(digests, tokens, salt, count, P)
            found = pool.find(digests, tokens)
            assert found == plain.find(salt, tokens, count)
            cost, free = pool.cost(found, len(tokens)), pool.num_free
            table, copy = pool.share(found), plain.share(found)
            fits = pool.grow(table, len(tokens))
            assert fits == plain.grow(copy, len(tokens)) == (cost <= free)
            assert table == copy
            assert not fits or pool.num_free == free - cost
            for i in range(len(found), count if fits else 0):
                pool.publish(table[i], digests[i], tokens[i * P : (i + 1) * P])
                plain.publish(copy[i], salt, tokens[: (i + 1) * P])
            live.append((table, copy, tokens, digests, salt))
        assert list(pool.free) == plain.free
        pool.check(table for table, *_ in live)


def exercise_all(seeds: int) -> None:
    for seed in range(seeds):
        exercise(seed)


@pytest.mark.parametrize("seed", range(60))
def test_pool_does_what_the_plain_model_does(seed: int) -> None:
    exercise(seed)


def reuse_newest(patch: pytest.MonkeyPatch) -> None:
    class Reversed(OrderedDict[int, None]):
        def popitem(self, last: bool = True) -> tuple[int, None]:
            return super().popitem(last=not last)

    patch.setattr(engine.block_pool, "OrderedDict", Reversed)


def release_head_first(patch: pytest.MonkeyPatch) -> None:
    original = BlockPool.release

    def release(self: BlockPool, table: list[int]) -> None:
        table.reverse()
        original(self, table)

    patch.setattr(BlockPool, "release", release)


def leave_the_evicted_findable(patch: pytest.MonkeyPatch) -> None:
    original = BlockPool.grow

    def grow(self: BlockPool, table: list[int], num_tokens: int) -> bool:
        before = dict(self.findable)
        grown = original(self, table, num_tokens)
        self.findable |= before
        return grown

    patch.setattr(BlockPool, "grow", grow)


@pytest.mark.parametrize("plant", [reuse_newest, release_head_first, leave_the_evicted_findable])
def test_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        exercise_all(20)


def digests_of(tokens: list[int], salt: str = "") -> list[bytes]:
    digests: list[bytes] = []
    extend_digests(digests, tokens, salt, len(tokens) // P, P)
    return digests


def test_equal_addresses_mean_equal_salt_and_equal_tokens_from_the_start() -> None:
    rng = random.Random(20)
    seen: dict[bytes, tuple[str, tuple[int, ...]]] = {}
    for _ in range(3000):
        tokens = [rng.choice([0, 1, 255, 256, 65536, 2**31 - 1]) for _ in range(P * rng.randint(1, 4))]
        salt = rng.choice(["", "a", "ab", "\0", "é", "\ud800"])
        for i, digest in enumerate(digests_of(tokens, salt)):
            assert seen.setdefault(digest, (salt, tuple(tokens[: (i + 1) * P]))) == (salt, tuple(tokens[: (i + 1) * P]))


def test_digests_extend_what_is_there() -> None:
    tokens = list(range(80))
    digests = digests_of(tokens[:32])
    extend_digests(digests, tokens, "", 5, P)
    assert digests == digests_of(tokens)


def test_a_colliding_digest_is_no_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.block_pool, "block_digest", lambda parent, content: b"same")
    pool, tokens, others = BlockPool(4), list(range(P)), list(range(1, P + 1))
    table: list[int] = []
    assert pool.grow(table, P)
    pool.publish(table[0], digests_of(tokens)[0], tokens)
    assert pool.find(digests_of(tokens), tokens) == table
    assert pool.find(digests_of(others), others) == []


def test_growing_beyond_the_free_blocks_changes_nothing() -> None:
    pool = BlockPool(3)
    table: list[int] = []
    assert pool.grow(table, P)
    before = list(pool.free), list(table)
    assert not pool.grow(table, 4 * P)
    assert (list(pool.free), list(table)) == before
    assert pool.grow(table, 3 * P)
    assert pool.num_free == 0


def test_a_freed_block_is_found_until_it_is_used_again_and_the_tail_goes_first() -> None:
    pool, tokens = BlockPool(4), list(range(4 * P))
    table: list[int] = []
    pool.grow(table, 4 * P)
    digests = digests_of(tokens)
    for i, block_id in enumerate(table):
        pool.publish(block_id, digests[i], tokens[i * P : (i + 1) * P])
    held = list(table)
    pool.release(table)
    assert pool.find(digests, tokens) == held
    for left in (3, 2, 1, 0):
        pool.grow(table, len(table) * P + 1)
        assert pool.find(digests, tokens) == held[:left]


@pytest.mark.parametrize("seed", range(10))
def test_rebuild_makes_the_books_agree_with_the_tables_after_any_damage(seed: int) -> None:
    rng = random.Random(seed)
    pool, tables = BlockPool(12), []
    for i in range(3):
        table: list[int] = []
        pool.grow(table, 3 * P)
        tokens = [i] * 3 * P
        for j, digest in enumerate(digests_of(tokens)):
            pool.publish(table[j], digest, tokens[:P])
        tables.append(table)
    tables.append(pool.share(tables[0][:2]))
    for block in rng.sample(pool.blocks, 4):
        block.num_refs += rng.choice([-1, 1, 5])
    for block_id in rng.sample(range(12), 3):
        pool.free.pop(block_id, None)
    pool.free[tables[1][0]] = None
    del pool.findable[rng.choice(list(pool.findable))]
    dropped = tables.pop(rng.randrange(4))
    with pytest.raises(AssertionError):
        pool.check(tables)
    pool.rebuild(tables)
    pool.check(tables)
    assert pool.num_free == 12 - len({block_id for table in tables for block_id in table}), dropped


def test_check_notices_each_kind_of_damage() -> None:
    def damaged(damage: Callable[[BlockPool, list[int]], object]) -> None:
        pool = BlockPool(4)
        table: list[int] = []
        pool.grow(table, 2 * P)
        pool.publish(table[0], b"x", list(range(P)))
        pool.check([table])
        damage(pool, table)
        with pytest.raises(AssertionError):
            pool.check([table])

    damaged(lambda pool, table: pool.free.__setitem__(table[0], None))
    damaged(lambda pool, table: pool.free.popitem())
    damaged(lambda pool, table: pool.findable.clear())
    damaged(lambda pool, table: pool.findable.__setitem__(b"y", table[1]))
    damaged(lambda pool, table: table.pop())
    damaged(lambda pool, table: table.append(table[0]))
