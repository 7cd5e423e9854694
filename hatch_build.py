"""Build the CPU kernels with the wheel, or into the clone of an editable install; without a compiler, say so."""

import importlib.util
import sysconfig
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Kernels(BuildHookInterface):
    """Run `hf_attnswap/native/build.py`; a wheel that has the library is for one platform and any Python and torch."""

    def initialize(self, version, build_data):
        path = Path(self.root, "hf_attnswap", "native", "build.py")
        spec = importlib.util.spec_from_file_location("attnswap_build", path)
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        reason = build.build()
        if reason is not None:
            build.LIBRARY.unlink(missing_ok=True)  # of other sources
            self.app.display_warning(f"hf_attnswap is installed without CPU kernels: {reason}")
            return
        self.app.display_info(f"built the CPU kernels for {', '.join(build.instruction_sets())}")
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data.update(pure_python=False, tag=f"py3-none-{platform}")
        build_data["artifacts"].append("hf_attnswap/native/*.so")
