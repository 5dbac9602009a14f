"""Django in one file: a view, a management command, and a TestCase with a store in memory."""

import os
import sys

import django
from django.conf import settings
from django.core.management import execute_from_command_line
from django.core.management.base import BaseCommand, CommandError
from django.http import HttpRequest, JsonResponse
from django.test import SimpleTestCase, override_settings
from django.urls import path
from django.views.decorators.http import require_POST
from jobs import rebuild_index

from joblock import JobLockHeldError, MemoryBlobStore, acquire_job_lock, hold_job_lock
from joblock.stores import open_store
from joblock.testing import take

if not settings.configured:
    settings.configure(
        ROOT_URLCONF=__name__,
        ALLOWED_HOSTS=["*"],
        SECRET_KEY="not for production",
        JOB_LOCKS=open_store(os.environ.get("LOCKS_URL", "memory:")),
    )
    django.setup()


@require_POST
def start(request: HttpRequest, user: str, vault: str) -> JsonResponse:
    lock = acquire_job_lock(settings.JOB_LOCKS, user, vault, reason="re-index")
    if not lock:
        retry_after = {"Retry-After": str(lock.retry_after_s())}
        return JsonResponse(lock.existing.to_dict(), status=409, headers=retry_after)
    return JsonResponse({"jobId": lock.job_id}, status=202)  # and enqueue it, as with Celery


urlpatterns = [path("<user>/<vault>/index", start)]


class Command(BaseCommand):
    """`manage.py index USER VAULT`, in management/commands/index.py."""

    def add_arguments(self, parser) -> None:
        parser.add_argument("user")
        parser.add_argument("vault")

    def handle(self, *, user: str, vault: str, **_) -> None:
        try:
            with hold_job_lock(settings.JOB_LOCKS, user, vault):
                rebuild_index(user, vault)
        except JobLockHeldError as error:
            raise CommandError(str(error), returncode=75) from error


class StartTest(SimpleTestCase):
    def test_a_double_click(self) -> None:
        with override_settings(JOB_LOCKS=MemoryBlobStore()):
            self.assertEqual(self.client.post("/u/v/index").status_code, 202)
            second = self.client.post("/u/v/index")
            self.assertEqual(second.status_code, 409)
            self.assertGreater(int(second.headers["Retry-After"]), 900)

    def test_a_job_that_crashed(self) -> None:
        store = MemoryBlobStore()
        take(store, "u", "v", expires_in_ms=-1)
        with override_settings(JOB_LOCKS=store):
            self.assertEqual(self.client.post("/u/v/index").status_code, 202)


if __name__ == "__main__":
    if sys.argv[1:2] == ["index"]:
        Command().run_from_argv(sys.argv)
    else:
        execute_from_command_line(sys.argv)
