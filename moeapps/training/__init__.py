# SPDX-License-Identifier: Apache-2.0
"""Task base class, optimizer, callbacks and run folders."""
