"""Writes `dynamic_map.json`: bitsandbytes' two 256-entry dynamic maps as float32 bit patterns, in hexadecimal.

Made with bitsandbytes 0.50.2 and torch 2.13.0 on x86-64 with AVX2, where torch's linspace uses fused multiply-adds;
without them, other bits come out. Run: python tests/golden/make_dynamic_map.py
"""

import json
from pathlib import Path

if __name__ == "__main__":
    from bitsandbytes.functional import create_dynamic_map

    maps = {
        name: [f"{bits & 0xFFFFFFFF:08x}" for bits in create_dynamic_map(signed=signed).numpy().view("int32").tolist()]
        for name, signed in (("signed", True), ("unsigned", False))
    }
    Path(__file__).with_name("dynamic_map.json").write_text(json.dumps(maps, indent=0) + "\n")
