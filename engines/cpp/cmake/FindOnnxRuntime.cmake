# ONNX Runtime's headers and shared library, from an SDK or from the Python wheel.
#
#   ONNXRUNTIME_ROOT          an unpacked SDK (include/, lib/); looked into first
#   ONNXRUNTIME_INCLUDE_DIR   folder with onnxruntime_cxx_api.h
#   ONNXRUNTIME_LIBRARY       libonnxruntime.so*; without it, the one of the onnxruntime wheel of Python_EXECUTABLE
#
# Defines the targets OnnxRuntime::Headers and, where the library was found, OnnxRuntime::OnnxRuntime.
if(ONNXRUNTIME_ROOT)  # an SDK wins over headers that were named besides
  unset(ONNXRUNTIME_INCLUDE_DIR CACHE)
endif()
find_path(ONNXRUNTIME_INCLUDE_DIR onnxruntime_cxx_api.h
  HINTS ${ONNXRUNTIME_ROOT}
  PATH_SUFFIXES include include/onnxruntime include/onnxruntime/core/session)
find_library(ONNXRUNTIME_LIBRARY NAMES onnxruntime libonnxruntime.so.1 HINTS ${ONNXRUNTIME_ROOT} PATH_SUFFIXES lib lib64)

if(NOT ONNXRUNTIME_LIBRARY)
  find_package(Python COMPONENTS Interpreter QUIET)
  if(Python_EXECUTABLE)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c "import importlib.util as u; print(u.find_spec('onnxruntime').submodule_search_locations[0])"
      OUTPUT_VARIABLE _wheel OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    file(GLOB _libraries ${_wheel}/capi/libonnxruntime.so.*)
    if(_wheel AND _libraries)
      list(GET _libraries 0 _library)
      set(ONNXRUNTIME_LIBRARY ${_library} CACHE FILEPATH "libonnxruntime.so" FORCE)
    endif()
  endif()
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(OnnxRuntime
  REQUIRED_VARS ONNXRUNTIME_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "set ONNXRUNTIME_ROOT to an SDK, or ONNXRUNTIME_INCLUDE_DIR to the folder of onnxruntime_cxx_api.h ('make cpp' fetches it)")
mark_as_advanced(ONNXRUNTIME_INCLUDE_DIR ONNXRUNTIME_LIBRARY)

if(OnnxRuntime_FOUND AND NOT TARGET OnnxRuntime::Headers)
  add_library(OnnxRuntime::Headers INTERFACE IMPORTED)
  target_include_directories(OnnxRuntime::Headers SYSTEM INTERFACE ${ONNXRUNTIME_INCLUDE_DIR})
  if(ONNXRUNTIME_LIBRARY)
    # A wheel holds the library under its full version only, while programs ask for its soname.
    set(_lib_folder ${CMAKE_BINARY_DIR}/lib)
    file(MAKE_DIRECTORY ${_lib_folder})
    file(CREATE_LINK ${ONNXRUNTIME_LIBRARY} ${_lib_folder}/libonnxruntime.so.1 SYMBOLIC)
    add_library(OnnxRuntime::OnnxRuntime SHARED IMPORTED)
    set_target_properties(OnnxRuntime::OnnxRuntime PROPERTIES
      IMPORTED_LOCATION ${_lib_folder}/libonnxruntime.so.1
      IMPORTED_SONAME libonnxruntime.so.1)
    target_link_libraries(OnnxRuntime::OnnxRuntime INTERFACE OnnxRuntime::Headers)
  endif()
endif()
