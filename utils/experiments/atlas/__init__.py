"""The attack atlas: each kind of attack and of bad scan on the same patients, a record each."""
