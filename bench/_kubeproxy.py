"""A rule set in the shape of kube-proxy's: a chain for each Service and for each endpoint, as text.

Written from what its table looks like: the packet's way, and the number of objects, are the same.
"""

from collections.abc import Iterator
from hashlib import sha256

from bench._cluster import PORT, TARGET_PORT, Cluster, service_name

TABLE = "ip bench-kube-proxy"
HOOKS = """\
add table {table}
add map {table} service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict ; }}
add map {table} no-endpoint-services {{ type ipv4_addr . inet_proto . inet_service : verdict ; }}
add set {table} cluster-ips {{ type ipv4_addr ; }}
add chain {table} mark-for-masquerade
add rule {table} mark-for-masquerade mark set mark or 0x4000
add chain {table} services
add rule {table} services ip daddr . meta l4proto . th dport vmap @service-ips
add chain {table} nat-output {{ type nat hook output priority -100 ; }}
add rule {table} nat-output jump services
add chain {table} nat-prerouting {{ type nat hook prerouting priority -100 ; }}
add rule {table} nat-prerouting jump services
add chain {table} nat-postrouting {{ type nat hook postrouting priority 100 ; }}
add rule {table} nat-postrouting mark and 0x4000 != 0 masquerade fully-random
add chain {table} filter-output {{ type filter hook output priority 0 ; }}
add rule {table} filter-output ct state new ip daddr . meta l4proto . th dport \
vmap @no-endpoint-services
"""


def ruleset(cluster: Cluster) -> str:
    lines = [HOOKS.format(table=TABLE)]
    for number in range(cluster.services):
        lines += service(cluster, number)
    return "\n".join(lines) + "\n"


def service(cluster: Cluster, number: int) -> Iterator[str]:
    ip, chain = cluster.cluster_ip(number), service_chain(number)
    yield f"add chain {TABLE} {chain}"
    for endpoint in cluster.endpoints(number):
        yield from endpoint_lines(number, endpoint)
    yield masquerading(chain, ip)
    yield picking(chain, number, cluster.endpoints(number))
    yield f"add element {TABLE} cluster-ips {{ {ip} }}"
    yield f"add element {TABLE} service-ips {{ {ip} . tcp . {PORT} : goto {chain} }}"


def change(number: int, gone: str, endpoints: list[str]) -> str:
    """Return what kube-proxy writes when one endpoint replaces another."""
    chain, old = service_chain(number), endpoint_chain(number, gone)
    new = next(ip for ip in endpoints if ip != gone and ip.startswith("10.224."))
    lines = [
        *endpoint_lines(number, new),
        f"flush chain {TABLE} {chain}",
        masquerading(chain, "10.96.0.10"),
        picking(chain, number, endpoints),
        f"flush chain {TABLE} {old}",
        f"delete chain {TABLE} {old}",
    ]
    return "\n".join(lines) + "\n"


def endpoint_lines(number: int, ip: str) -> Iterator[str]:
    chain = endpoint_chain(number, ip)
    yield f"add chain {TABLE} {chain}"
    yield f"add rule {TABLE} {chain} ip saddr {ip} jump mark-for-masquerade"
    yield f"add rule {TABLE} {chain} meta l4proto tcp dnat to {ip}:{TARGET_PORT}"


def masquerading(chain: str, ip: str) -> str:
    match = f"ip daddr {ip} tcp dport {PORT} ip saddr != 10.128.0.0/9"
    return f"add rule {TABLE} {chain} {match} jump mark-for-masquerade"


def picking(chain: str, number: int, endpoints: list[str]) -> str:
    chains = (endpoint_chain(number, ip) for ip in endpoints)
    choices = ", ".join(f"{slot} : goto {name}" for slot, name in enumerate(chains))
    return f"add rule {TABLE} {chain} numgen random mod {len(endpoints)} vmap {{ {choices} }}"


def service_chain(number: int) -> str:
    return f"service-{mark(number)}-default/{service_name(number)}/tcp/http"


def endpoint_chain(number: int, ip: str) -> str:
    base = f"default/{service_name(number)}/tcp/http__{ip}/{TARGET_PORT}"
    return f"endpoint-{mark(ip)}-{base}"


def mark(what: object) -> str:
    return sha256(str(what).encode()).hexdigest()[:8].upper()
