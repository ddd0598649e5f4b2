"""The demo's manifests folder: written as a person or a controller would, file by file."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from pyproxy.demo.cluster import NODES, Object, Phase, Pod, node_object, pod_object


class Manifests:
    """The folder that pyproxy reads, with the pods as they are now."""

    def __init__(self, folder: Path, services: Iterable[Object], pods: Iterable[Pod]) -> None:
        self.folder = folder
        self._phases: dict[Pod, Phase] = dict.fromkeys(pods, "ready")
        self._write("services.yaml", services)
        self._write("nodes.yaml", (node_object(node) for node in NODES))
        self._write_pods()

    @property
    def phases(self) -> Mapping[Pod, Phase]:
        return self._phases

    def put(self, pod: Pod, phase: Phase) -> None:
        self._phases[pod] = phase
        self._write_pods()

    def remove(self, pod: Pod) -> None:
        del self._phases[pod]
        self._write_pods()

    def _write_pods(self) -> None:
        self._write("pods.yaml", (pod_object(pod, phase) for pod, phase in self._phases.items()))

    def _write(self, name: str, objects: Iterable[Object]) -> None:
        """Replace a file at once: a reader finds the old one or the new one, whole."""
        draft = self.folder / f".{name}.draft"
        draft.write_text(yaml.safe_dump_all(objects, sort_keys=False), encoding="utf-8")
        draft.replace(self.folder / name)
