"""Rules in the shape of kube-proxy's for the demo's cluster, IPv4: a chain for each endpoint.

Written from what its tables look like, for the addresses that ``moves`` asks.
"""

from pyproxy.demo.cluster import CLUSTER_CIDRS, POD_PORT, PODS, SERVICE_CIDRS

SERVICES = {"CLUSTER": ("10.96.0.12", 8080), "BALANCER": ("198.18.0.10", 80)}
NODE_PORT = 30080
PODS_CIDR, SERVICES_CIDR = CLUSTER_CIDRS[0], SERVICE_CIDRS[0]
ENDPOINTS = [pod.ips[0] for pod in PODS]


def iptables():
    """Return input of ``iptables-restore``."""
    chains = ["SERVICES", "NODEPORTS", "POSTROUTING", "MARK-MASQ"]
    chains += [f"SVC-{name}" for name in SERVICES] + [f"SEP-{n}" for n in range(len(ENDPOINTS))]
    rules = [
        '-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
        '-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
        '-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING',
        "-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000",
        "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN",
        "-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000",
        "-A KUBE-POSTROUTING -j MASQUERADE --random-fully",
    ]
    for name, (ip, port) in SERVICES.items():
        match = f"-d {ip}/32 -p tcp -m tcp --dport {port}"
        rules.append(f"-A KUBE-SERVICES {match} -j KUBE-SVC-{name}")
        rules.append(f"-A KUBE-SVC-{name} ! -s {PODS_CIDR} {match} -j KUBE-MARK-MASQ")
        rules += picking(f"KUBE-SVC-{name}")
    rules.append("-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS")
    node_port = f"-A KUBE-NODEPORTS -p tcp -m tcp --dport {NODE_PORT}"
    rules += [f"{node_port} -j KUBE-MARK-MASQ", f"{node_port} -j KUBE-SVC-CLUSTER"]
    for number, ip in enumerate(ENDPOINTS):
        rules.append(f"-A KUBE-SEP-{number} -s {ip}/32 -j KUBE-MARK-MASQ")
        target = f"DNAT --to-destination {ip}:{POD_PORT}"
        rules.append(f"-A KUBE-SEP-{number} -p tcp -m tcp -j {target}")
    declared = [f":KUBE-{chain} - [0:0]" for chain in chains]
    return "\n".join(["*nat", *declared, *rules, "COMMIT", ""])


def picking(chain):
    for number in range(len(ENDPOINTS)):
        left = len(ENDPOINTS) - number
        chance = f"-m statistic --mode random --probability {1 / left:.10f} " if left > 1 else ""
        yield f"-A {chain} {chance}-j KUBE-SEP-{number}"


def nftables():
    """Return input of ``nft -f``."""
    chains = [
        f"chain endpoint-{number} {{ ip saddr {ip} jump mark-for-masquerade;"
        f" meta l4proto tcp dnat to {ip}:{POD_PORT}; }}"
        for number, ip in enumerate(ENDPOINTS)
    ]
    choices = ", ".join(f"{number} : goto endpoint-{number}" for number in range(len(ENDPOINTS)))
    elements = []
    for name, (ip, port) in SERVICES.items():
        chains.append(
            f"chain service-{name} {{ ip daddr {ip} tcp dport {port} ip saddr != {PODS_CIDR}"
            f" jump mark-for-masquerade;"
            f" numgen random mod {len(ENDPOINTS)} vmap {{ {choices} }}; }}"
        )
        elements.append(f"{ip} . tcp . {port} : goto service-{name}")
    return f"""
table ip kube-proxy {{
  map service-ips {{
    type ipv4_addr . inet_proto . inet_service : verdict
    elements = {{ {", ".join(elements)} }}
  }}
  map service-nodeports {{
    type inet_proto . inet_service : verdict
    elements = {{ tcp . {NODE_PORT} : goto external }}
  }}
  chain mark-for-masquerade {{ mark set mark or 0x4000; }}
  chain masquerading {{
    mark and 0x4000 == 0 return
    mark set mark xor 0x4000
    masquerade fully-random
  }}
  {chr(10).join(chains)}
  chain external {{ jump mark-for-masquerade; goto service-CLUSTER; }}
  chain services {{
    ip daddr . meta l4proto . th dport vmap @service-ips
    fib daddr type local ip daddr != 127.0.0.0/8 meta l4proto . th dport vmap @service-nodeports
  }}
  chain nat-prerouting {{ type nat hook prerouting priority -100; jump services; }}
  chain nat-output {{ type nat hook output priority -100; jump services; }}
  chain nat-postrouting {{ type nat hook postrouting priority 100; jump masquerading; }}
  chain cluster-ips-check {{ ip daddr {SERVICES_CIDR} drop; }}
  chain filter-forward {{
    type filter hook forward priority 0; ct state new jump cluster-ips-check; }}
  chain filter-output {{
    type filter hook output priority 0; ct state new jump cluster-ips-check; }}
}}
"""


BY_MODE = {
    "kube-iptables": (("iptables-restore", "--noflush"), iptables()),
    "kube-nftables": (("nft", "-f", "-"), nftables()),
}


def leaves(mode, name):
    """Return the command that takes the rules of a Service's address out of the packets' way."""
    ip, port = SERVICES[name]
    if mode == "kube-nftables":
        element = f"{{ {ip} . tcp . {port} }}"
        return ("nft", "delete", "element", "ip", "kube-proxy", "service-ips", element)
    return ("iptables", "-t", "nat", "-D", "KUBE-SERVICES", *matching(name))


def returns(mode, name):
    """Return the command that puts them back."""
    ip, port = SERVICES[name]
    if mode == "kube-nftables":
        element = f"{{ {ip} . tcp . {port} : goto service-{name} }}"
        return ("nft", "add", "element", "ip", "kube-proxy", "service-ips", element)
    return ("iptables", "-t", "nat", "-I", "KUBE-SERVICES", "1", *matching(name))


def matching(name):
    ip, port = SERVICES[name]
    match = f"-d {ip}/32 -p tcp -m tcp --dport {port} -j KUBE-SVC-{name}"
    return match.split()
