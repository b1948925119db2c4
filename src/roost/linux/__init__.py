"""The kernel and nothing else: synchronous, typed functions over system calls.

The only place with raw system calls.  A function raises OSError with the kernel's own errno and the path it was about;
what the errno means for a pool or a HOME is the caller's to say.  Nothing here logs, waits or knows what roost is.

Calls go through ctypes, which releases the GIL; `fcntl.ioctl` with a buffer over 1024 bytes holds it for the whole call
(233 ms were seen), so it is not used for those.
"""
