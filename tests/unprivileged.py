"""The command without root's right to pass over file permissions, which other users never had. Run by test_run_folder.py."""

import ctypes
import os
import runpy


def give_up_rights() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3; this thread and those that it starts
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then the same of the capabilities above 31
    for call in (libc.capget, libc.capset):
        if call(header, sets):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        for kind in (0, 1):  # `os.access` goes by what is permitted
            sets[kind] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


give_up_rights()
runpy.run_module("mptrain.main", run_name="__main__", alter_sys=True)
