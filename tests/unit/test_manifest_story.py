"""Manifest files that change: what is told, what stays, what is remembered."""

from pyproxy.manifests.resolve import Manifests, Unreadable
from pyproxy.model import Node, Replace, ServiceCIDR
from tests.manifest_builders import SETTINGS, node, service

BAD = service(port=70000)
BAD_TEXT = "shop.yaml: document 1: Service default/web: spec.ports[0].port: 70000 is not a port"


def ports_by_service(step):
    """Return the Services and their ports, if the step replaces Services."""
    for change in step.changes:
        if change.kind == "Service":
            return {found.name.name: found.ports[0].port for found in change.objects}
    return None


def test_the_first_step_has_every_kind_even_of_nothing():
    cidrs = ServiceCIDR("kubernetes", ("10.96.0.0/16", "fd00:10:96::/112"))
    assert Manifests(SETTINGS).receive({}).changes == (
        Replace("Service", ()),
        Replace("EndpointSlice", ()),
        Replace("Node", (Node("here"),)),
        Replace("ServiceCIDR", (cidrs,)),
    )


def test_only_kinds_that_changed_are_sent_again():
    manifests = Manifests(SETTINGS)
    manifests.receive({"shop.yaml": (service(),)})
    again = manifests.receive({"shop.yaml": (service(),)})
    moved = manifests.receive({"other.yaml": (service(),), "zone.yaml": (node("here", "a"),)})
    assert (again.changes, [change.kind for change in moved.changes]) == ((), ["Node"])


def test_a_removed_document_and_a_removed_file_remove_their_objects():
    manifests = Manifests(SETTINGS)
    manifests.receive({"a.yaml": (service("a"), service("b")), "c.yaml": (service("c"),)})
    assert ports_by_service(manifests.receive({"a.yaml": (service("b"),)})) == {"b": 80}


def test_the_last_good_version_of_a_bad_file_stays_and_other_files_go_on():
    manifests = Manifests(SETTINGS)
    manifests.receive({"shop.yaml": (service(), service("gone"))})
    bad = manifests.receive({"shop.yaml": (BAD,), "b.yaml": (service("b"),)})
    assert (ports_by_service(bad), bad.errors) == ({"b": 80, "gone": 80, "web": 80}, (BAD_TEXT,))


def test_an_error_is_told_when_it_appears_and_when_it_goes():
    manifests = Manifests(SETTINGS)
    files = [(BAD,), (BAD,), (service(port=81),), (service(port=81),)]
    steps = [manifests.receive({"shop.yaml": file}) for file in files]
    assert [(step.errors, step.mended) for step in steps] == [
        ((BAD_TEXT,), ()),
        ((), ()),
        ((), (BAD_TEXT,)),
        ((), ()),
    ]


def test_an_error_goes_with_its_file():
    manifests = Manifests(SETTINGS)
    manifests.receive({"shop.yaml": (BAD,)})
    assert manifests.receive({}).mended == (BAD_TEXT,)


def test_a_file_that_has_never_been_good_counts_as_far_as_it_can_be_read():
    step = Manifests(SETTINGS).receive({"shop.yaml": (BAD, service("good"))})
    assert ports_by_service(step) == {"good": 80}


def test_an_unreadable_file_keeps_what_it_said():
    manifests = Manifests(SETTINGS)
    manifests.receive({"shop.yaml": (service(),)})
    step = manifests.receive({"shop.yaml": Unreadable("document 1: line 3: no")})
    assert step == ((), ("shop.yaml: document 1: line 3: no",), (), ())


def test_an_object_stays_with_its_file_while_another_file_has_it_too():
    manifests = Manifests(SETTINGS)
    manifests.receive({"shop.yaml": (service(),)})
    copied = manifests.receive({"copy.yaml": (service(port=81),), "shop.yaml": (service(),)})
    assert copied.errors == (
        "copy.yaml: document 1: Service default/web: it is already in shop.yaml, document 1",
    )
    moved = manifests.receive({"copy.yaml": (service(port=81),)})
    assert (copied.changes, ports_by_service(moved)) == ((), {"web": 81})


def test_a_file_that_was_removed_while_bad_does_not_come_back():
    manifests = Manifests(SETTINGS)
    manifests.receive({"shop.yaml": (service(),)})
    manifests.receive({"shop.yaml": Unreadable("it is not a regular file")})
    assert ports_by_service(manifests.receive({})) == {}
    assert ports_by_service(manifests.receive({"shop.yaml": Unreadable("again")})) is None


def test_a_claim_on_a_held_address_is_refused_and_the_holder_keeps_it():
    manifests = Manifests(SETTINGS)
    first = manifests.receive({"web.yaml": (service(),)}).changes[0].objects[0]
    rival = service("a", clusterIP=first.cluster_ip4)
    step = manifests.receive({"web.yaml": (service(),), "rival.yaml": (rival,)})
    assert step == (
        (),
        (
            "rival.yaml: document 1: Service default/a: spec.clusterIP: "
            f"{first.cluster_ip4} is taken by Service default/web",
        ),
        (),
        (),
    )


def test_two_services_may_exchange_their_addresses():
    manifests = Manifests(SETTINGS)
    one, two = "10.96.0.1", "10.96.0.2"
    manifests.receive({"f": (service("a", clusterIP=one), service("b", clusterIP=two))})
    step = manifests.receive({"f": (service("a", clusterIP=two), service("b", clusterIP=one))})
    (change,) = step.changes
    assert [found.cluster_ip4 for found in change.objects] == [two, one]


def test_a_good_version_that_fits_no_more_breaks_only_its_own_file():
    manifests = Manifests(SETTINGS)
    before, after = service("a", clusterIP="10.96.0.1"), service("a", port=0)
    manifests.receive({"a.yaml": (before,)})
    rival = service("b", clusterIP="10.96.0.1")
    step = manifests.receive({"a.yaml": (after,), "b.yaml": (rival,)})
    assert [error.partition(": ")[0] for error in step.errors] == ["a.yaml", "b.yaml"]
    assert ports_by_service(step) is None


def test_a_note_is_told_once():
    manifests = Manifests(SETTINGS)
    files = {"shop.yaml": ({"kind": "Secret"},)}
    assert [manifests.receive(files).notes for _ in range(2)] == [("kind Secret is ignored",), ()]
