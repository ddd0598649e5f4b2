"""Alerts and dashboard: Prometheus understands them, and they ask for what pyproxy exports."""

import json
import re
import shutil

import pytest
import yaml

from pyproxy.metrics import COUNTERS, GAUGES, HISTOGRAMS, READINGS, Metrics
from tests.deploy.tools import DEPLOY, MODES, ROOT, run

ALERTS = DEPLOY / "prometheus" / "alerts.yaml"
DASHBOARD = DEPLOY / "grafana" / "pyproxy.json"
SELECTOR = re.compile(r"\b([a-z_:]+)\{([^}]*)\}|\b((?:kubeproxy|pyproxy|rest_client|process)_\w+)")
LABEL = re.compile(r"(\w+)(?:=~|!~|!=|=)")
GROUPED = re.compile(r"\bby \(([^)]*)\)")
TARGET = {"job", "instance"}  # what scraping adds
ROWS = {row.name: {*row.labels} for row in (*COUNTERS, *GAUGES, *HISTOGRAMS, *READINGS)}
COLLECTED = {  # what collectors of their own export
    "pyproxy_connections_total": {"proto", "result"},
    "pyproxy_connections_active": {"proto"},
    "up": set(),
}


def exported():
    """Return the series that any mode exports, and their labels."""
    found = dict(COLLECTED)
    for mode in MODES:
        _, text = Metrics(mode, (4, 6)).exposition("")
        for name, kind in re.findall(r"# TYPE (\S+) (\w+)", text.decode()):
            labels = ROWS.get(name, COLLECTED.get(name, set()))
            suffixes = ("_bucket", "_count", "_sum") if kind == "histogram" else ("",)
            for suffix in suffixes:
                found[name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    return found


def dashboard_queries():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    assert queries
    return [q.replace("$__rate_interval", "5m").replace("$instance", ".+") for q in queries]


def alert_queries():
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


@pytest.mark.parametrize("query", [*dashboard_queries(), *alert_queries()])
def test_it_asks_for_what_is_exported(query):
    series = exported()
    asked, known = set(), set()
    for name, matchers, bare in SELECTOR.findall(query):
        assert (name or bare) in series
        known |= series[name or bare] | TARGET
        asked |= set(LABEL.findall(re.sub(r'"[^"]*"', '""', matchers)))
    for names in GROUPED.findall(query):
        asked |= set(re.findall(r"\w+", names))
    assert known
    assert asked <= known


def test_a_query_for_something_else_would_be_noticed():
    with pytest.raises(AssertionError):
        test_it_asks_for_what_is_exported('pyproxy_frontends{flavour="x"}')
    with pytest.raises(AssertionError):
        test_it_asks_for_what_is_exported("sum(pyproxy_no_such_metric)")


def test_prometheus_can_run_the_dashboard(tmp_path):
    rules = [{"record": f"q{n}", "expr": query} for n, query in enumerate(dashboard_queries())]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    run("promtool", "check", "rules", path)


def test_alerts_fire_when_they_should(tmp_path):
    run("promtool", "check", "rules", ALERTS)
    shutil.copy(ALERTS, tmp_path)
    shutil.copy(ROOT / "tests" / "deploy" / "alerts_test.yaml", tmp_path)
    run("promtool", "test", "rules", tmp_path / "alerts_test.yaml")


def test_every_alert_is_tried():
    alerts = re.findall(r"alert: (\w+)", ALERTS.read_text())
    tried = (ROOT / "tests" / "deploy" / "alerts_test.yaml").read_text()
    assert [alert for alert in alerts if alert not in tried] == []


def test_panels_have_places_of_their_own():
    places = [panel["gridPos"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    cells = [
        (x, y)
        for p in places
        for x in range(p["x"], p["x"] + p["w"])
        for y in range(p["y"], p["y"] + p["h"])
    ]
    assert len(cells) == len(set(cells))
