# SPDX-License-Identifier: Apache-2.0
"""Task folders, one per application."""
