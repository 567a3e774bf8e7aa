"""The door: the `vitscale` command and the processes that it starts. Never touches a tensor."""
