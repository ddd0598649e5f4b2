from collections import Counter

import pytest

from pyproxy.balancer import LONGEST_TURN, MOST_CLIENTS, Picker, turn_of
from pyproxy.model import Backend, Pool
from tests.builders import address

A, B, C = address(1), address(2), address(3)


def pool(weights=(1, 1, 1), **fields):
    backends = tuple(Backend(address(n), w) for n, w in enumerate(weights, 1))
    return Pool(backends, **fields)


def picker(*pools):
    subject = Picker(lambda n: 0)
    subject.use(pools)
    return subject


def picks(subject, chosen, count, client="10.0.0.1", now=0.0):
    return [subject.pick(chosen, client, now).address for _ in range(count)]


@pytest.mark.parametrize(
    ("weights", "turn"),
    [
        pytest.param([1, 1, 1], (A, B, C), id="equal"),
        pytest.param([7, 7], (A, B), id="equal and heavy"),
        pytest.param([5, 1, 1], (A, B, A, A, A, C, A), id="heavy is spread"),
        pytest.param([4, 2], (A, B, A), id="reduced"),
        pytest.param([3], (A,), id="alone"),
    ],
)
def test_a_turn_gives_each_its_share(weights, turn):
    assert turn_of(pool(weights)) == turn


def test_round_robin_by_name_ignores_weights():
    assert turn_of(pool([5, 1, 1], scheduler="rr")) == (A, B, C)


def test_a_turn_stays_short_and_forgets_nobody():
    turn = Counter(turn_of(pool([65535, 1, 30000])))
    assert turn.total() <= LONGEST_TURN
    assert set(turn) == {A, B, C}
    assert turn[A] / turn[C] == pytest.approx(65535 / 30000, rel=0.02)


@pytest.mark.parametrize("count", [200, 255, 256, 300, 1000])
def test_weights_count_in_large_pools(count):
    heavy = count // 2
    turn = Counter(turn_of(pool([3] * heavy + [1] * (count - heavy)), longest=256))
    assert set(turn.values()) == {3, 1}
    assert turn.total() == 3 * heavy + count - heavy


def test_weights_that_are_nearly_equal_are_no_weights():
    assert turn_of(pool([65535, 65534])) == (A, B)


def test_picks_go_round():
    chosen = pool()
    assert picks(picker(chosen), chosen, 4) == [A, B, C, A]


def test_an_equal_pool_goes_on_where_the_old_one_was():
    old, new = pool(), pool()
    subject = picker(old)
    picks(subject, old, 1)
    subject.use([new])
    assert picks(subject, new, 2) == [B, C]


def test_random_asks_for_a_number_below_the_turn():
    chosen = pool(scheduler="random")
    asked = []
    subject = Picker(lambda n: asked.append(n) or n - 1)
    subject.use([chosen])
    assert picks(subject, chosen, 1) == [C]
    assert asked[-1] == 3


@pytest.mark.parametrize("scheduler", ["sh", "dh", "mh"])
def test_a_source_always_hashes_to_the_same_backend(scheduler):
    chosen = pool([1] * 8, scheduler=scheduler)
    subject = picker(chosen)
    of = {c: set(picks(subject, chosen, 5, c)) for c in (f"10.0.0.{n}" for n in range(64))}
    assert all(len(backends) == 1 for backends in of.values())
    assert len(set().union(*of.values())) > 4


@pytest.mark.parametrize("scheduler", ["lc", "wlc", "sed", "nq"])
def test_least_connections_prefers_the_idle_and_the_heavy(scheduler):
    chosen = pool([1, 1, 2], scheduler=scheduler)
    subject = picker(chosen)
    subject.opened(A)
    subject.opened(C)
    assert picks(subject, chosen, 3) in ([B, B, B], [C, B, B], [B, C, B], [C, C, B])
    subject.opened(B)
    assert set(picks(subject, chosen, 3)) == {C}
    subject.closed(A)
    assert A in picks(subject, chosen, 3)


@pytest.mark.parametrize(
    ("schedulers", "counts"), [(["rr", "random"], False), (["rr", "lc"], True), ([], False)]
)
def test_connections_are_counted_where_a_scheduler_looks_at_the_counts(schedulers, counts):
    assert picker(*[pool([1], scheduler=scheduler) for scheduler in schedulers]).counts is counts


def test_affinity_holds_until_the_client_was_silent_for_so_long():
    chosen = pool(affinity_seconds=10)
    subject = picker(chosen)
    assert [subject.pick(chosen, "c", now).address for now in (0, 9, 18)] == [A, A, A]
    assert subject.pick(chosen, "c", 28).address == B, "ten seconds after the last use"
    assert subject.pick(chosen, "other", 28).address == C


def test_affinity_survives_an_update_that_keeps_the_backend():
    old, new = pool([1, 1], affinity_seconds=10), pool([1, 1, 1], affinity_seconds=10)
    subject = picker(old)
    first = subject.pick(old, "c", 0).address
    subject.use([new])
    assert subject.pick(new, "c", 1).address == first


def test_affinity_moves_when_the_backend_goes_or_does_not_answer():
    both, one = pool([1, 1], affinity_seconds=10), pool([1], affinity_seconds=10)
    subject = picker(both)
    assert subject.pick(both, "c", 0).address == A
    assert subject.pick(both, "c", 0, {A}).address == B
    assert subject.pick(both, "c", 1).address == B
    subject.use([one])
    assert subject.pick(one, "c", 2).address == A


def test_pools_of_an_owner_share_its_affinity():
    cluster, local = pool([1, 1, 1], affinity_seconds=10), pool([1, 1], affinity_seconds=10)
    subject = picker(cluster, local)
    first = subject.pick(cluster, "c", 0).address
    assert [subject.pick(local, "c", 1).address for _ in range(3)] == [first] * 3


def test_another_backend_is_given_while_there_is_one():
    chosen = pool()
    subject = picker(chosen)
    assert subject.pick(chosen, "c", 0, {A, B}).address == C
    assert subject.pick(chosen, "c", 0, {A, B, C}).address in (A, B, C)


def test_affinity_forgets_clients_that_stay_away():
    chosen = pool(affinity_seconds=1)
    subject = picker(chosen)
    for number in range(5000):
        subject.pick(chosen, str(number), float(number))
    assert len(subject._affinity) == 1


def test_affinity_remembers_so_many_clients_and_forgets_who_was_silent_longest():
    chosen, told = pool([1] * 8, affinity_seconds=1000), []
    subject = Picker(lambda n: 0, lambda: told.append(len(subject._affinity)))
    subject.use([chosen])
    first = {str(n): subject.pick(chosen, str(n), 0).address for n in range(MOST_CLIENTS)}
    assert subject.pick(chosen, "0", 1).address == first["0"], "who comes again is younger than all"
    assert told == []
    for number in range(100):
        subject.pick(chosen, f"new {number}", 2)
    assert told == [MOST_CLIENTS], "said once"
    assert set(first) - set(subject._affinity) == {str(n) for n in range(1, 101)}
    assert all(
        subject.pick(chosen, c, 3).address == first[c] for c in ("0", "101", str(MOST_CLIENTS - 1))
    )


def test_that_affinity_forgets_is_told_again_when_it_had_room_meanwhile():
    chosen, told = pool(affinity_seconds=10), []
    subject = Picker(lambda n: 0, lambda: told.append(True))
    subject.use([chosen])
    for start in (0, 1000):
        for number in range(MOST_CLIENTS + 1):
            subject.pick(chosen, str(number + start * MOST_CLIENTS), start)
    assert told == [True, True]
