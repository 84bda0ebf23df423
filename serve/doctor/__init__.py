"""`python -m serve doctor`: what of this machine keeps the model from running, or from speed.

    machine.py   every read of the machine; recorded and played back
    facts.py     what was read, as values: cards, bridges, IOMMU
    checks.py    findings: a fault, and one sentence of what its owner can do
    report.py    the table, JSON, exit status

Reads, never changes: what is wrong with a host is its owner's to decide.
"""
