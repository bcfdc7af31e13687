"""vLLM servers as Ray actors.

In: settings with ``on_ray``, in a process that is connected to a Ray cluster. Out: servers whose processes run on the
cluster's machines, for the fleet to ask as it asks its own. Nothing here verifies weights: a server reads a folder that
its machine must see, and `room` finds out before a run which machines do not; or it reads a copy, by `copies`.
"""
