"""What a daemon tells of its own settings to those who look at its node."""

from pyproxy.view import Answer


class Setup(Answer, frozen=True):
    """The answer of ``/v1/setup``."""

    node: str
    mode: str
    kubeconfig: str
    needs_pod_cidrs: bool
    pod_cidrs: tuple[str, ...]
    service_cidrs: tuple[str, ...]
    open_files: int
    is_beside: bool = False
