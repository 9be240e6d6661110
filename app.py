"""=== Django Async Views ===

Basic Async View:
  async def my_view(request):
      return JsonResponse({...})

With Await:
  async def my_view(request):
      data = await async_operation()
      return JsonResponse(data)

Concurrent Calls:
  results = await asyncio.gather(
      api_call_1(),
      api_call_2()
  )

Running ASGI:
  pip install "Django>=5.2" "uvicorn[standard]"
  uvicorn app:application --reload               # this file
  uvicorn myproject.asgi:application --reload    # a whole project
"""

import asyncio

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.views.decorators.http import require_safe

settings.configure(
    ROOT_URLCONF=__name__,  # this file, under whatever name it is copied to
    # The hosts that CommonMiddleware and build_absolute_uri() accept: add your own.
    ALLOWED_HOSTS=["localhost", "127.0.0.1", "[::1]"],
    LOGGING_CONFIG=None,  # Django's default drops tracebacks while DEBUG is off
)


# These simulated calls only sleep. Put real calls in their place.
async def get_message() -> dict[str, str]:
    """Stand in for a real call to a slow service: return a message after 0.1 s."""
    await asyncio.sleep(0.1)
    return {"message": "Data fetched asynchronously"}


async def get_user_stats() -> dict[str, int]:
    """Stand in for a real call to a user service: return counts after 0.05 s."""
    await asyncio.sleep(0.05)
    return {"users": 1000, "active": 250}


async def get_transaction_stats() -> dict[str, int]:
    """Stand in for a real call to a payment service: return counts after 0.05 s."""
    await asyncio.sleep(0.05)
    return {"total": 5000, "today": 42}


# Bare Django answers a POST or a DELETE as it does a GET; require_safe returns 405.
@require_safe
async def health_check(request: HttpRequest) -> JsonResponse:
    """Return the status at once. An async view does not have to await anything."""
    return JsonResponse({"status": "healthy", "async": True})


@require_safe
async def fetch_data(request: HttpRequest) -> JsonResponse:
    """Return the message of one call, which takes 0.1 s."""
    data = await get_message()
    return JsonResponse(data)


@require_safe
async def dashboard_data(request: HttpRequest) -> JsonResponse:
    """Return the counts of two calls after 0.05 s, because they run concurrently.

    If either call raises an exception, the view raises it at once.
    """
    users, transactions = await asyncio.gather(
        get_user_stats(), get_transaction_stats()
    )
    return JsonResponse({"users": users, "transactions": transactions})


urlpatterns = [
    path("", dashboard_data),  # the link that uvicorn prints
    path("health/", health_check),
    path("data/", fetch_data),
    path("dashboard/", dashboard_data),
]

application = get_asgi_application()

if __name__ == "__main__":
    print(__doc__, end="")
