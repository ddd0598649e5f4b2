import yaml
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import fields

from pyproxy.config import (
    IPVS,
    ClientConnection,
    Config,
    Conntrack,
    DetectLocal,
    IPTables,
    Logging,
    LogOptions,
    LogStream,
    NFTables,
    Userspace,
    VModule,
    Winkernel,
    with_defaults,
)
from pyproxy.config.file import dump, load
from pyproxy.config.text import duration_text, parse_duration

texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12)
int32 = st.integers(-(2**31), 2**31 - 1)
durations = st.integers(-(30 * 86400 * 10**9), 30 * 86400 * 10**9).map(lambda ns: ns / 10**9)
by_type = {str: texts, int: int32, bool: st.booleans(), float: st.floats(-1e6, 1e6)}


def structs(kind, **special):
    """Make any value of a struct whose fields are plain or named in ``special``."""
    plain = {
        f.name: durations if f.name.endswith("_seconds") else by_type.get(f.type, texts)
        for f in fields(kind)
    }
    return st.builds(kind, **plain | special)


streams = structs(LogStream)
configs = structs(
    Config,
    feature_gates=st.dictionaries(texts, st.booleans(), max_size=3),
    client_connection=structs(ClientConnection),
    logging=structs(
        Logging,
        vmodule=st.lists(structs(VModule), max_size=2).map(tuple),
        options=st.builds(LogOptions, text=streams, json=streams),
    ),
    iptables=structs(IPTables),
    ipvs=structs(IPVS, exclude_cidrs=st.lists(texts, max_size=2).map(tuple)),
    nftables=structs(NFTables),
    userspace=structs(Userspace),
    winkernel=structs(Winkernel),
    detect_local=structs(DetectLocal),
    node_port_addresses=st.lists(texts, max_size=2).map(tuple),
    conntrack=structs(Conntrack),
).map(with_defaults)


@given(configs)
def test_loading_a_dump_gives_the_settings_back(config):
    assert load(yaml.safe_dump(dump(config))) == (config, ())


@given(configs)
def test_filling_in_defaults_twice_changes_nothing(config):
    assert with_defaults(config) == config


@given(durations)
def test_a_printed_duration_is_read_back(seconds):
    assert parse_duration(duration_text(seconds)) == seconds
