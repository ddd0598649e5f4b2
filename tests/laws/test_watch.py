from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from pyproxy.kube.events import (
    Absent,
    Bookmark,
    Changed,
    Closed,
    Deleted,
    Expired,
    Failed,
    Page,
    Refused,
    Skipped,
    Unreachable,
    Unreadable,
)
from pyproxy.kube.watch import ListPage, Watch, WatchMachine
from pyproxy.model import ObjectName, Remove, Replace, Service, Upsert
from tests.fakes.history import History

FOREIGN = "of another proxy"
QUIET_REQUESTS = 40
QUIET_SECONDS = 400.0

names = st.sampled_from("abcd")
types = st.sampled_from(["ClusterIP", "NodePort", FOREIGN])


def event(past):
    """What a server says of its past, as it is decoded."""
    name, version = ObjectName("default", past.name), str(past.version)
    if past.what == "DELETED":
        return Deleted(version, name)
    if past.obj == FOREIGN:
        return Skipped(version, name, FOREIGN)
    return Changed(version, Service(name, type=past.obj))


class AnyServer(RuleBasedStateMachine):
    """A server and a network that do whatever they like, and a mirror built from the changes."""

    @initialize(
        abilities=st.sampled_from(["streams", "refuses to stream", "does not know of streams"]),
        streaming=st.booleans(),
        gone_as_status=st.booleans(),
    )
    def start(self, abilities, streaming, gone_as_status):
        self.abilities = abilities
        self.gone_as_status = gone_as_status
        self.history = History()
        self.mirror = {}
        self.machine = WatchMachine("Service", streaming=streaming, random=lambda: 0.5)
        self.pages = {}  # by continue token: the version, and what is left
        self.answer = None  # the events to come, while a watch is open
        self.sent = 0  # the version up to which the open watch has told everything
        self.owes_mark = False  # the open watch is a list whose end is not marked yet

    # --- the cluster ------------------------------------------------------------------------

    @rule(name=names, type=types)
    def put(self, name, type):
        self.history.put(name, type)
        self.tell()

    @rule(name=names)
    def delete(self, name):
        self.history.delete(name)
        self.tell()

    @rule()
    def forget(self):
        self.history.forget()
        self.pages.clear()
        if self.answer is not None:
            self.answer.append(Expired("compacted"))

    def tell(self):
        """Let the open watch see what has just happened."""
        if self.answer is not None:
            self.answer += map(event, self.history.since(self.sent) or ())
            self.sent = self.history.version

    # --- the client -------------------------------------------------------------------------

    @precondition(lambda self: self.answer is None)
    @rule(repeats=st.integers(0, 3))
    def ask(self, repeats=0):
        request = self.machine.next_request()
        if isinstance(request, ListPage):
            self.list_page(request)
        elif request.send_initial_events:
            self.stream_list()
        else:
            self.resume(int(request.version), repeats)

    def list_page(self, request):
        if not request.continue_token:
            version, left = self.history.version, self.history.present()
        elif request.continue_token in self.pages:
            version, left = self.pages[request.continue_token]
        else:
            self.end(Refused(410, "the token has expired", "Expired"))
            return
        limit = 1 if request.limit else len(left)
        found = [event(past) for past in left[:limit]]
        token = f"token-{len(self.pages)}-{self.history.version}" if left[limit:] else ""
        self.pages[token] = (version, left[limit:])
        objects = tuple(e.obj for e in found if isinstance(e, Changed))
        self.receive(Page(str(version), token, objects))
        self.end(Closed())

    def stream_list(self):
        if self.abilities == "refuses to stream":
            self.end(Refused(422, "resourceVersionMatch is forbidden", "Invalid"))
            return
        self.answer = [event(past) for past in self.history.present()]
        self.sent = self.history.version
        self.owes_mark = self.abilities == "streams"

    def resume(self, version, repeats):
        pasts = self.history.since(version)
        if pasts is None and self.gone_as_status:
            self.end(Refused(410, "too old", "Expired"))
        elif pasts is None:
            self.answer = [Expired("too old")]
        else:
            again = self.history.since(version - repeats)
            self.answer = list(map(event, pasts if again is None else again))
            self.sent = self.history.version

    @precondition(lambda self: self.answer)
    @rule(count=st.integers(1, 4))
    def deliver(self, count):
        for _ in range(count):
            if self.answer:
                self.receive(self.answer.pop(0))
            if self.answer is not None and self.machine.is_useless:
                self.end(Closed())

    @precondition(lambda self: self.answer is not None and not self.answer)
    @rule()
    def bookmark(self):
        self.answer.append(Bookmark(str(self.sent), is_complete=self.owes_mark))
        self.owes_mark = False

    @rule()
    def catch_up(self):
        if self.answer is None:
            self.ask()
        if self.owes_mark:
            self.bookmark()
        while self.answer:
            self.deliver(1)

    # --- trouble ----------------------------------------------------------------------------

    @precondition(lambda self: self.answer is not None)
    @rule(
        last=st.sampled_from([None, None, Failed(500, "etcd"), Unreadable("", "not JSON")]),
        seconds=st.sampled_from([0.0, 5.0, 60.0]),
    )
    def cut(self, last, seconds):
        if last is not None:
            self.receive(last)
        self.end(Closed(seconds))

    @precondition(lambda self: self.answer is None)
    @rule(
        outcome=st.one_of(
            st.just(Unreachable("no route")),
            st.builds(Refused, st.sampled_from([400, 401, 410, 422, 429, 503])),
            st.just(Refused(404)),
            st.just(Refused(504, "", "ResourceVersionTooLarge")),
        )
    )
    def be_refused(self, outcome):
        self.machine.next_request()
        if outcome == Refused(404):
            self.receive(Absent())
        self.end(outcome)

    # --- what comes of it -------------------------------------------------------------------

    def receive(self, received):
        match self.machine.receive(received):
            case Upsert(obj=obj):
                self.mirror[obj.name.name] = obj.type
            case Remove(name=name):
                self.mirror.pop(name.name, None)
            case Replace(objects=objects):
                self.mirror = {obj.name.name: obj.type for obj in objects}

    def end(self, outcome):
        self.answer, self.owes_mark = None, False
        seconds = self.machine.ended(outcome)
        assert 0.0 <= seconds <= 600.0

    def teardown(self):
        """Be quiet and answer: the mirror must then be the server."""
        if not hasattr(self, "machine"):
            return
        for _ in range(QUIET_REQUESTS):
            if self.answer is None:
                self.ask()
            if self.owes_mark:
                self.bookmark()
            while self.answer:
                self.deliver(1)
            if self.answer is not None:
                self.end(Closed(QUIET_SECONDS))
        request = self.machine.next_request()
        assert isinstance(request, Watch), "all is listed"
        assert request.version, "all is listed"
        assert self.mirror == {
            name: type for name, (_, type) in self.history.objects.items() if type != FOREIGN
        }


AnyServer.TestCase.settings = settings(max_examples=400)
TestTheMirrorEqualsAServerThatHasGoneQuiet = AnyServer.TestCase
