# SPDX-License-Identifier: Apache-2.0
"""The fast path on CPUs: the same numbers as the plain layer, sooner."""
