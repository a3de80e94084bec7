"""Models that no graph can hold: cut between child modules by hooks, with opaque regions and the chain engine.

``building`` is where ``transform`` comes in; ``blocks`` finds the list to cut, ``probe`` measures what depends on what,
``run`` is the program, ``plan`` writes it down.
"""
