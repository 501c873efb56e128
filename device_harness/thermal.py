"""Temperatures of a device, °C, as its kernel or Android's thermal service gives them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from device_harness.device import CONTROL_S, Device, one_line

ZONES = "/sys/class/thermal"
MOST = 200  # sensors
PLAUSIBLE = (-60.0, 200.0)  # °C: drivers give other values for sensors that are off


@dataclass(frozen=True)
class Temperatures:
    """Sensor -> °C; source: "sysfs", "thermalservice", or None where neither says anything."""

    source: str | None
    celsius: Mapping[str, float]


def read_temperatures(device: Device) -> Temperatures:
    """What the sensors say now. Raises DeviceError if the device is lost."""
    script = f"""for zone in {ZONES}/thermal_zone*; do
  [ -r "$zone/temp" ] && echo "$(cat "$zone/type" 2>/dev/null) $(cat "$zone/temp" 2>/dev/null)"
done; true"""
    text = device.shell(script, deadline_s=CONTROL_S).stdout.decode("utf-8", "replace")
    if found := parse_zones(text):
        return Temperatures("sysfs", found)
    said = device.shell("command -v dumpsys > /dev/null && dumpsys thermalservice; true", deadline_s=CONTROL_S)
    found = parse_thermalservice(said.stdout.decode("utf-8", "replace"))
    return Temperatures("thermalservice" if found else None, found)


def parse_zones(text: str) -> dict[str, float]:
    """Lines "type millidegrees"; a type that comes again gets a number."""
    found: dict[str, float] = {}
    for line in text.splitlines()[:MOST]:
        name, _, value = line.rpartition(" ")
        if re.fullmatch(r"-?\d{1,7}", value):
            _add(found, name, int(value) / 1000)
    return found


def parse_thermalservice(text: str) -> dict[str, float]:
    """`dumpsys thermalservice`: the temperatures that the HAL gives now, or the last ones where it gives none."""
    _, _, current = text.partition("Current temperatures from HAL:")
    part = current.partition("Current cooling devices")[0] if current else text
    found: dict[str, float] = {}
    for match in list(re.finditer(r"Temperature\{([^{}]*)\}", part))[:MOST]:
        fields = dict(pair.strip().split("=", 1) for pair in match.group(1).split(",") if "=" in pair)
        if re.fullmatch(r"-?\d{1,5}(\.\d{1,6})?", fields.get("mValue", "")):
            _add(found, fields.get("mName", ""), float(fields["mValue"]))
    return found


def _add(found: dict[str, float], name: str, celsius: float) -> None:
    if PLAUSIBLE[0] <= celsius <= PLAUSIBLE[1]:
        name = one_line(name, 40) or "unnamed"
        number = sum(known == name or known.startswith(f"{name} #") for known in found)
        found[f"{name} #{number + 1}" if number else name] = round(celsius, 1)
