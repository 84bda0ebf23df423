"""A CycloneDX bill of materials of an image: its Debian and its Python packages.

    python docker/sbom.py IMAGE FILE

Asked of the image itself: dpkg's database and the installed distributions, not what was meant to be
installed. The labels, the series' hash among them, are properties of the image. Standard library
only, so that it runs where nothing but Docker is; the tests hold it against CycloneDX's schema.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import NAMESPACE_URL, uuid5

sys.path.insert(0, str(Path(__file__).resolve().parent))

import engine  # noqa: E402

# Runs in the image, on its own Python.
LIST = r"""
import json, subprocess
from importlib.metadata import distributions
command = ["dpkg-query", "-W", "-f", "${Package}\t${Version}\t${Architecture}\n"]
listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
lines = open("/etc/os-release").read().splitlines()
name = lambda d: d.metadata["Name"].lower().replace("_", "-")
system = dict(line.split("=", 1) for line in lines if "=" in line)
print(json.dumps({
    "system": {key: value.strip('"') for key, value in system.items()},
    "debian": [line.split("\t") for line in listed.splitlines()],
    "python": sorted({(name(d), d.version) for d in distributions()}),
}))
"""


def packages(image: str) -> dict[str, Any]:
    """What is installed in an image: `system` (os-release), `debian` and `python`.

    Raises:
        engine.DockerError: the image cannot be run.
    """
    options = ("--rm", "--network", "none", "--entrypoint", "python")
    return json.loads(engine.ask("run", *options, image, "-c", LIST))


def bill(image: str, known: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """CycloneDX 1.6 of an image.

    Args:
        known: what `docker image inspect` says.
        found: as `packages` returns it.
    """
    name, _, tag = image.rpartition(":")
    labels = known["Config"]["Labels"] or {}
    system = found["system"]
    distro = quote(system.get("VERSION_CODENAME", ""))
    components = [
        component(package, version, f"deb/{system['ID']}", f"?arch={architecture}&distro={distro}")
        for package, version, architecture in found["debian"]
    ]
    components += [component(package, version, "pypi") for package, version in found["python"]]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid5(NAMESPACE_URL, known['Id'])}",
        "version": 1,
        "metadata": {
            "timestamp": known["Created"][:19] + "Z",
            "component": {
                "type": "container",
                "bom-ref": known["Id"],
                "name": name,
                "version": tag,
                "properties": [{"name": key, "value": labels[key]} for key in sorted(labels)],
            },
        },
        "components": components,
        "dependencies": [
            {"ref": known["Id"], "dependsOn": [entry["bom-ref"] for entry in components]}
        ],
    }


def component(name: str, version: str, kind: str, qualifiers: str = "") -> dict[str, str]:
    """One package; its package URL is its reference too."""
    purl = f"pkg:{kind}/{quote(name, safe='')}@{quote(version, safe=':')}{qualifiers}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def write(image: str, path: Path) -> int:
    """Write the bill of an image, and return the number of packages in it.

    Raises:
        engine.DockerError: there is no such image, or it cannot be run.
    """
    known = engine.inspect(image)
    if known is None:
        raise engine.DockerError(f"sbom: there is no image {image}")
    data = bill(image, known, packages(image))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return len(data["components"])


if __name__ == "__main__":
    try:
        print(f"{write(sys.argv[1], Path(sys.argv[2]))} packages in {sys.argv[2]}")
    except engine.DockerError as error:
        sys.exit(str(error))
