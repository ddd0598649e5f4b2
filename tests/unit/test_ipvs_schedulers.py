"""Schedulers that the kernel may not have."""

import pytest

from pyproxy.plan import Plan, plan_port
from pyproxy.proxier._ipvssched import PROBE, Scheduled, Schedulers
from pyproxy.rules.ipvs import Server
from tests.builders import SITE, endpoint, owner, service_port
from tests.fakes.ip_vs import FakeIpvs

MESSAGE = "the kernel has no such scheduler"


class Inner:
    def __init__(self):
        self.synced = []

    async def sync(self, plan, changed):
        self.synced.append(set(changed))

    def distrust(self):
        pass


@pytest.fixture
def kernel():
    return FakeIpvs(schedulers=("rr", "wlc"))


@pytest.fixture
def schedulers(kernel):
    return Schedulers(lambda: kernel)


def planned(*names):
    plan = Plan()
    for name in names:
        port = service_port(name=owner(name), scheduler=name)
        plan.put(owner(name), plan_port(port, [endpoint(1)], SITE))
    return plan


async def test_those_that_are_missing_are_found_and_no_server_is_left(schedulers, kernel):
    await schedulers.ask(["rr", "mh", "wlc"])
    assert schedulers.missing == {"mh"}
    assert not kernel.known


async def test_each_is_asked_for_once(schedulers, kernel):
    await schedulers.ask(["rr", "mh"])
    before = len(kernel.sent)
    await schedulers.ask(["mh", "rr"])
    assert len(kernel.sent) == before


async def test_one_that_is_installed_later_is_found(schedulers, kernel):
    await schedulers.ask(["mh"])
    kernel.schedulers = (*kernel.schedulers, "mh")
    schedulers.forget()
    await schedulers.ask(())
    assert not schedulers.missing


async def test_a_server_of_somebody_else_in_the_place_of_the_probe_stays(schedulers, kernel):
    kernel.known[PROBE] = Server("rr")
    await schedulers.ask(["mh"])
    assert not schedulers.missing, "nothing is known: the write will tell"
    assert PROBE in kernel.known


async def test_a_service_whose_scheduler_cannot_be_worked_out_stops_nobody(schedulers):
    def wanted(port):
        return frozenset({{"rr": "rr"}[port.owner.service]})

    inner = Inner()
    plan = planned("rr", "mh")
    await Scheduled(inner, schedulers, wanted).sync(plan, set(plan.ports))
    assert inner.synced == [set(plan.ports)]


async def test_each_service_that_lacks_its_scheduler_is_named_once(schedulers, caplog):
    inner = Inner()
    subject = Scheduled(inner, schedulers, lambda port: frozenset({port.owner.service}))
    plan = planned("mh", "rr", "sh")
    for _ in range(2):
        await subject.sync(plan, set(plan.ports))
    told = [(r.scheduler, r.instead, r.services) for r in caplog.records if r.message == MESSAGE]
    assert told == [("mh", "rr", "default/mh"), ("sh", "rr", "default/sh")]
    assert inner.synced == [set(plan.ports)] * 2


async def test_of_very_many_services_some_are_named(schedulers, caplog):
    subject = Scheduled(Inner(), schedulers, lambda _port: frozenset({"mh"}))
    plan = planned(*"abcdefgh")
    await subject.sync(plan, set(plan.ports))
    named = ", ".join(f"default/{name}" for name in "abcde")
    assert [r.services for r in caplog.records] == [f"{named}, and 3 more"]
