"""What the local Runpod has to rent: GPU types, datacentres, CPU types and stock. Prices and stock are examples.

Stock is a plain dictionary that a test or a demo may change: catalog.stock["US-KS-2"]["NVIDIA H200"] = "NONE".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

# id, display name, pool, GiB, secure USD/h, community USD/h (0 = not offered there)
_GPUS = [
    ("NVIDIA H100 80GB HBM3", "H100 SXM", "ADA_80_PRO", 80, 3.99, 2.69),
    ("NVIDIA H100 PCIe", "H100 PCIe", "ADA_80_PRO", 80, 2.89, 1.99),
    ("NVIDIA H200", "H200 SXM", "HOPPER_141", 141, 4.59, 0.0),
    ("NVIDIA B200", "B200", "BLACKWELL_180", 180, 6.79, 5.98),
    ("NVIDIA A100 80GB PCIe", "A100 PCIe", "AMPERE_80", 80, 1.79, 1.19),
    ("NVIDIA A100-SXM4-80GB", "A100 SXM", "AMPERE_80", 80, 1.79, 1.39),
    ("NVIDIA L40S", "L40S", "ADA_48_PRO", 48, 0.99, 0.79),
]
_BOTH = ["STANDARD", "HIGH_PERFORMANCE"]
# Serverless, flex: USD per GPU-hour by pool
_SERVERLESS = {
    "ADA_80_PRO": 4.176,
    "HOPPER_141": 5.58,
    "BLACKWELL_180": 8.64,
    "AMPERE_80": 2.736,
    "ADA_48_PRO": 1.908,
}
# id, region, network volume types
_DATACENTERS = [
    ("US-KS-2", "NORTH_AMERICA", _BOTH),
    ("US-CA-2", "NORTH_AMERICA", ["STANDARD"]),
    ("US-MO-1", "NORTH_AMERICA", ["STANDARD"]),
    ("US-NC-2", "NORTH_AMERICA", _BOTH),
    ("EU-RO-1", "EUROPE", _BOTH),
    ("EU-CZ-1", "EUROPE", ["STANDARD"]),
    ("CA-MTL-1", "NORTH_AMERICA", ["STANDARD"]),
    ("US-TX-1", "NORTH_AMERICA", []),
]
_STOCK = {
    "US-KS-2": {"NVIDIA H200": "HIGH", "NVIDIA H100 80GB HBM3": "MEDIUM", "NVIDIA A100-SXM4-80GB": "LOW"},
    "US-CA-2": {"NVIDIA H200": "LOW", "NVIDIA B200": "MEDIUM", "NVIDIA H100 80GB HBM3": "HIGH"},
    "US-MO-1": {"NVIDIA A100-SXM4-80GB": "MEDIUM"},
    "US-NC-2": {"NVIDIA H200": "MEDIUM", "NVIDIA L40S": "HIGH"},
    "EU-RO-1": {"NVIDIA L40S": "HIGH", "NVIDIA B200": "LOW"},
    "EU-CZ-1": {"NVIDIA A100 80GB PCIe": "LOW"},
    "CA-MTL-1": {"NVIDIA H100 PCIe": "LOW"},
    "US-TX-1": {"NVIDIA H200": "LOW"},
}
_COMPLIANCE = {"US-KS-2": ["SOC_2_TYPE_2"], "EU-RO-1": ["GDPR", "ISO_IEC_27001"]}
_CPUS = [("cpu3c", "Compute-Optimized", 2), ("cpu3g", "General Purpose", 4), ("cpu5c", "5 GHz Compute-Optimized", 2)]
_NO_STOCK = "NONE"
_LEVELS = [_NO_STOCK, "LOW", "MEDIUM", "HIGH"]


@dataclass
class Catalog:
    """Stock by datacentre and GPU id, levels NONE, LOW, MEDIUM, HIGH; what is absent is NONE.

    `prices`: USD per GPU-hour in the place of the usual ones: Secure by GPU id, serverless by pool. `surcharge`: what
    is charged over what is shown.
    """

    prices: dict[str, float] = field(default_factory=dict)
    surcharge: float = 1.0
    stock: dict[str, dict[str, str]] = field(default_factory=lambda: {dc: dict(row) for dc, row in _STOCK.items()})

    def level(self, datacenter: str, gpu: str) -> str:
        """Stock of one GPU type in one datacentre."""
        return self.stock.get(datacenter, {}).get(gpu, _NO_STOCK)

    def gpus(self, with_stock: bool = False) -> list[Json]:
        """Answer of GET /v2/catalog/gpus."""
        return [self._gpu(row, with_stock) for row in _GPUS]

    def datacenters(self, with_stock: bool = False) -> list[Json]:
        """Answer of GET /v2/catalog/datacenters."""
        return [self._datacenter(row, with_stock) for row in _DATACENTERS]

    def cpus(self) -> list[Json]:
        """Answer of GET /v2/catalog/cpus."""
        return [
            {
                "id": name,
                "name": title,
                "group": name,
                "vcpu": {"min": 2, "max": 32},
                "ramGbPerVcpu": ram,
                "price": {"securePerVcpu": 0.03, "serverlessPerVcpu": 0.00001},
            }
            for name, title, ram in _CPUS
        ]

    def _gpu(self, row: tuple[str, str, str, int, float, float], with_stock: bool) -> Json:
        gpu_id, name, pool, memory, secure, community = row
        answer: Json = {
            "id": gpu_id,
            "name": name,
            "pool": pool,
            "manufacturer": "NVIDIA",
            "memory": memory,
            "secure": True,
            "community": community > 0,
            "price": {
                "secure": self.prices.get(gpu_id, secure),
                "community": community,
                "serverless": self.prices.get(pool, _SERVERLESS[pool]),
            },
            "maxCount": {"secure": 8, "community": 8 if community else 0},
        }
        if with_stock:
            levels = {dc: self.level(dc, gpu_id) for dc, _, _ in _DATACENTERS}
            answer["availability"] = max(levels.values(), key=_LEVELS.index)
            answer["dataCenters"] = [{"id": dc, "name": dc, "availability": at} for dc, at in levels.items()]
            answer["cudaVersions"] = [{"version": "12.8", "available": True}]
        return answer

    def _datacenter(self, row: tuple[str, str, list[str]], with_stock: bool) -> Json:
        dc, region, volume_types = row
        answer: Json = {
            "id": dc,
            "name": dc,
            "region": region,
            "globalNetwork": True,
            "networkVolumeTypes": volume_types,
            "compliance": _COMPLIANCE.get(dc, []),
        }
        if with_stock:
            answer["gpuAvailability"] = [
                {"id": gpu[0], "name": gpu[1], "availability": self.level(dc, gpu[0])} for gpu in _GPUS
            ]
        return answer
