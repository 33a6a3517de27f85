# SPDX-License-Identifier: Apache-2.0
"""Data modules, mixing of domains, caches and package archives."""
